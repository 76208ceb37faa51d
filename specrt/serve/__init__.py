"""``specrt serve``: OpenAI's HTTP interface over an :class:`specrt.AsyncEngine`.

Needs the packages of ``pip install 'specrt[serve]'``.
"""
