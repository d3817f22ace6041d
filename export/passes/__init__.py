"""From one file to another: lowering, precision, quantisation."""
