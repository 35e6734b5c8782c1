"""Trajectories of a teacher: the job that makes them and the store that keeps them."""
