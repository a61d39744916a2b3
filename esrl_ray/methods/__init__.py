"""Ways to learn a policy from steps: the method of this project and its peers, one file each."""
