"""How long a policy's calls take, row by row and backend by backend."""
