"""Decides placement, schedule and slots of the streamed pages. No torch here: plain numbers in, plain data out."""
