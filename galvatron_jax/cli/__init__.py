"""The command line: thin commands that read documents, call the API, and print. JAX only where a command needs it."""
