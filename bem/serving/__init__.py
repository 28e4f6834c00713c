"""Serving: OpenAI's protocol over `bem.Engine`, versions that change while it runs, metrics.

    bem serve --base smollm2-135m --store runs/store

Needs the extra `serve`; `bem.serving.server` says so where it is missing. Nothing here computes anything: one
thread steps the engines (`driver`), everything else is asyncio around it.
"""
