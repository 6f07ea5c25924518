"""The only place that replaces names of other packages, once per process and for good.

It does so for programs that know nothing of FlashHead (`mlx_flashhead.run`), and for mlx-vlm's
loops, which read a head's weights.
"""
