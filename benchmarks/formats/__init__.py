"""The files that image sets come in, one module per format; nothing here is ever unpickled."""
