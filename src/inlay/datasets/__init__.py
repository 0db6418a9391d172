"""Datasets: files of conversations, read as rows of messages, each row with its file and line.

    read_dataset("data.jsonl#500") -> [Row("data.jsonl:1", messages=({"role": "user", "content": …}, …)), …]

`row.py` knows the ways to write a conversation, `files.py` the file formats, `read.py` names, samples and the Hub.
"""
