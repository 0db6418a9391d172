"""The command line: parse, one library call, print. Results on stdout, progress and log on stderr."""
