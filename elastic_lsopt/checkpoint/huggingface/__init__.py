"""Hugging Face's folders on sharded parameters: each rank reads, draws and writes its own ranges, none the whole model.

shapes.py        a model without memory for its parameters, and its buffers, which are in no file
file_layout.py   which tensor of a folder holds which elements of which parameter (experts, renamed keys)
folder_weights.py, drawn_weights.py   where weights come from: the files, or the initialisation, replayed
fill.py          from there into this rank's shards
export.py, export_folder.py, model_card.py   and out again
"""
