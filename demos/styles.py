"""The page's styles, in the colours of Gradio's theme."""

from __future__ import annotations

INK, LINE = "var(--body-text-color, inherit)", "var(--border-color-primary, #8886)"
TABLE = f"""
.vtp-scroll {{ overflow-x: auto; color: {INK}; }}
.vtp-metrics {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
.vtp-metrics th, .vtp-metrics td {{ padding: .3rem .5rem; border-bottom: 1px solid {LINE}; text-align: right; font-weight: normal; color: {INK}; }}
.vtp-metrics thead th {{ opacity: .75; }}
.vtp-metrics tr > :first-child {{ text-align: left; }}
.vtp-metrics td:last-child {{ min-width: 6rem; overflow-wrap: break-word; }}
@media (max-width: 34rem) {{ .vtp-metrics {{ font-size: .8rem; }} .vtp-metrics th, .vtp-metrics td {{ padding: .25rem .2rem; }}
  .vtp-metrics [scope=row] {{ min-width: 5.5rem; }} .vtp-metrics td:last-child {{ min-width: 4.5rem; }}
  .vtp-metrics thead :nth-child(4), .vtp-metrics td:nth-child(4) {{ display: none; }} }}
""".strip()  # noqa: E501
CARDS = f"""
.vtp-cards {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(10.5rem, 44%), 1fr)); gap: .75rem; list-style: none; margin: 0; padding: 0; }}
.vtp-cards li {{ border: 1px solid {LINE}; border-radius: .4rem; padding: .6rem; margin: 0; color: {INK}; overflow-wrap: anywhere; }}
.vtp-cards img {{ width: 100%; height: auto; border-radius: .2rem; display: block; }}
.vtp-cards li > h3 {{ font-size: 1rem; font-weight: 600; margin: 0 0 .4rem; color: {INK}; }}
.vtp-cards p {{ margin: .3rem 0 0; color: {INK}; }}
.vtp-cards .vtp-small {{ font-size: .85rem; opacity: .75; }}
""".strip()  # noqa: E501
PAGE = """
.vtp-ended { position: sticky; top: 0; z-index: 10; padding: .6rem 1rem; background: #8b1a1a; color: #fff; font-weight: 600; }
.vtp-head h1 { margin: 0; font-size: 1.5rem; font-weight: 700; } .vtp-head p { margin: .1rem 0 0; }
.vtp-status { min-height: 1.6rem; color: var(--body-text-color); overflow-wrap: anywhere; } .vtp-status progress { vertical-align: middle; }
.vtp-about { font-size: .85rem; opacity: .8; }
.vtp-report { width: 100%; height: 80vh; border: 1px solid var(--border-color-primary); border-radius: 6px; background: white; }
@media (prefers-color-scheme: dark) { .vtp-report { background: #14161a; } }
"""  # noqa: E501
