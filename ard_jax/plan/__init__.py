"""What a run will cost, from its programs compiled ahead of time for devices that are not there."""
