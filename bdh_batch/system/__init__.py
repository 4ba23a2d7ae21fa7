"""What the machine and its files are, within bounds: documents, memory, cores, threads."""
