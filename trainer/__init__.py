"""The torch half of stpatch: reads shards (docs/format.md), pretrains a masked autoencoder, embeds whole slices.

=================  ======================================================================
``pretrain.py``    ``python -m trainer.pretrain``: the training loop and the model folder
``objective.py``   what is learned: the loss over hidden entries
``model.py``       the masked autoencoder: encode, decode, predict
``units.py``       what a site sees: neighbours, macro-domains
``masks.py``       which (site, gene) entries are hidden
``expression.py``  counts -> normalised expression
``data.py``        the reader: a folder of shards -> batches in a reproducible order
``stream.py``      the second reader: shards by URL, through webdataset
``ranks.py``       the processes that train together, and the signal to stop
``launch.py``      ``python -m trainer.launch``: start them, also in a SLURM job
``snapshots.py``   where an interrupted run goes on
``budget.py``      memory and arithmetic of a step
``embed.py``       ``python -m trainer.embed``: whole slices -> one vector a spot
``config.py``      flags over a file over the dataclasses' defaults
``progress.py``    lines on the terminal, in ``metrics.jsonl`` and in other logs
``report.py``      the model card, and the learning curve as an SVG
``files.py``       hashes, whole-file writes, safetensors with stable bytes
``errors.py``      what is wrong, where, and what to do next
=================  ======================================================================
"""
