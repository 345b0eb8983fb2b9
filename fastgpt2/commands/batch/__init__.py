"""`fastgpt2 batch`: a file of prompts through the queue, one line or row of output for each of its lines.

It reads the input line by line, sends each line's job, and notes each result at once, so that a run which was broken
off goes on with what is missing. `command` is where to begin reading.
"""
