"""The torch half of stpatch: reads shards (docs/format.md), pretrains a masked autoencoder, embeds whole slices.

=================  ======================================================================
``pretrain.py``    ``python -m trainer.pretrain``: the training loop and the model folder
``model.py``       the masked autoencoder: encode, decode, loss
``masks.py``       which (site, gene) entries are hidden
``data.py``        the reader: a folder of shards -> batches in a reproducible order
``expression.py``  counts -> normalised expression
``embed.py``       ``python -m trainer.embed``: whole slices -> one vector a spot
``config.py``      flags over a file over the dataclasses' defaults
``progress.py``    lines on the terminal and in ``metrics.jsonl``
``card.py``        the model card
``files.py``       hashes, whole-file writes, safetensors with stable bytes
``errors.py``      what is wrong, where, and what to do next
=================  ======================================================================
"""
