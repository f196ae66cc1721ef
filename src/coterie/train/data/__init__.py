"""From the data sets of a fine-tuning file to rows of tokens.

`load` reads data sets and divides them, `formats` tells what their rows are, `tokens` makes tokens of rows and counts
what teaches nothing, `template` finds the answers in chats, `steps` is for process reward models.
"""
