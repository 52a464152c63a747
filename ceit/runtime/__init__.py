"""What the jobs (`train`, `evaluate`, `demo`) are run with: options, processes, progress, files, tables."""
