"""The C library behind engine "native": compiling, loading, and the arrays it takes."""
