"""What may go wrong around a run: kills, full disks, damaged and malicious files, workers that die, numbers that break."""
