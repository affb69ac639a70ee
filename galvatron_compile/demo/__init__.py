"""The demo: a small Llama planned and trained on the local machine, with proof of its numbers.

``python -m torch.distributed.run --nproc-per-node 4 -m galvatron_compile.demo``
"""
