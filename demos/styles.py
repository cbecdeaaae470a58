"""The page's styles, in the colours of Gradio's theme."""

from __future__ import annotations

from vtprune.core.info import GROUPS

from .options import PUBLISHED

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
.vtp-cards li > h2 {{ font-size: 1rem; font-weight: 600; margin: 0 0 .4rem; color: {INK}; }}
.vtp-cards p {{ margin: .3rem 0 0; color: {INK}; }}
.vtp-cards .vtp-small {{ font-size: .85rem; opacity: .75; }}
""".strip()  # noqa: E501
HEADINGS = "\n".join(  # of the methods in the list of recipes: each group's first choice has one above it
    f'ul.options li[aria-label*=" · {group}:"]:not(ul.options li[aria-label*=" · {group}:"] ~ li)::before '
    f'{{ content: "{group}"; display: block; position: absolute; top: .3rem; left: .5rem; font-weight: 700; }}\n'
    f'ul.options li[aria-label*=" · {group}:"]:not(ul.options li[aria-label*=" · {group}:"] ~ li) '
    "{ position: relative; padding-top: 2rem; }"
    for group in (*GROUPS.values(), PUBLISHED)
)
PAGE = f"""
.gradio-container .app, .gradio-container main.app {{ padding: .4rem .8rem; max-width: none; --layout-gap: .5rem; }}
.vtp-ended {{ position: sticky; top: 0; z-index: 10; display: flex; justify-content: space-between; gap: 1rem; padding: .6rem 1rem; background: #8b1a1a; color: #fff; font-weight: 600; }}
.vtp-ended[hidden] {{ display: none; }}
.vtp-ended button {{ border: 1px solid #fff; border-radius: 4px; padding: 0 .6rem; background: none; color: #fff; font: inherit; cursor: pointer; }}
.vtp-head {{ display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 .8rem; }} .vtp-head h1 {{ margin: 0; font-size: 1.3rem; font-weight: 700; }} .vtp-head p {{ margin: 0; }}
.vtp-about {{ font-size: .85rem; overflow-wrap: anywhere; margin-left: auto; max-width: 60rem; }} .vtp-about summary {{ cursor: pointer; }}
.vtp-status {{ min-height: 1.6rem; color: var(--body-text-color); overflow-wrap: anywhere; }} .vtp-status progress {{ vertical-align: middle; }}
.vtp-headline {{ font-size: 1.15rem; line-height: 1.3; font-weight: 700; }}
#sides {{ align-items: end; }} #sides > button {{ flex: 0 1 7rem; }}
#sides input {{ text-overflow: ellipsis; padding-right: 1.6rem; }} [id^=file-] {{ border: 0 !important; }}
@media (min-width: 60rem) {{ ul.options {{ min-width: 26rem; }} }}
.gradio-container {{ --block-info-text-color: var(--body-text-color); --input-placeholder-color: var(--body-text-color-subdued); --block-label-text-color: var(--body-text-color); --block-title-text-color: var(--body-text-color); }}
body:not(.dark) {{ --color-accent: #1d4ed8; --button-primary-background-fill: #1d4ed8; --button-primary-background-fill-hover: #1e40af; --body-text-color-subdued: #5c5f66; }}
body:not(.dark) button.primary {{ background: #1d4ed8; }} body:not(.dark) button[role=tab].selected {{ color: #1d4ed8; }}
#answers {{ gap: 1.2rem; }} #about .html-container, #status .html-container, #answers .html-container, #theatre .html-container, #metrics .html-container {{ padding: .1rem .4rem; }}
.vtp-answer {{ display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 .7rem; color: var(--body-text-color); overflow-wrap: anywhere; }}
.vtp-answer h2 {{ margin: 0; font-size: .95rem; font-weight: 400; color: var(--body-text-color); }} .vtp-answer > div {{ font-size: 1.1rem; font-weight: 600; }}
.vtp-answer summary {{ cursor: pointer; }} .vtp-mark {{ font-size: .95rem; margin-left: .4rem; }}
.vtp-word {{ font-size: .85rem; color: var(--body-text-color); margin: .4rem 0 0; }}
#theatre .vt-scenes {{ gap: 1.2rem; }} #theatre .vt-scene > h2 {{ display: none; }}
.vtp-report {{ width: 100%; height: 80vh; border: 1px solid var(--border-color-primary); border-radius: 6px; background: white; }}
@media (prefers-color-scheme: dark) {{ .vtp-report {{ background: #14161a; }} }}
{HEADINGS}
"""  # noqa: E501
