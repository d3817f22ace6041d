"""One module per command of the command line; heavy imports happen inside the functions."""
