"""From a recipe to a federation of organisations: folders, keys, policies, and the processes of each party."""
