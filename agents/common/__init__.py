"""What two or more agents share; each module is one idea."""
