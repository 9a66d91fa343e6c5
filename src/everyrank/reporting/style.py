"""The page's style sheet; it names no font and no file that would have to be fetched."""

STYLE = """
:root { color-scheme: light dark; --back: #fbfbfa; --card: #ffffff; --ink: #1d2126; --soft: #667080; --edge: #e3e5e8;
  --train: #2d6cb5; --held: #d9730d; --good: #1d7f4f; --bad: #c0392b; }
@media (prefers-color-scheme: dark) { :root { --back: #16181b; --card: #1f2226; --ink: #e6e8ea; --soft: #98a1ac;
  --edge: #32363c; --train: #6aa7ea; --held: #f0a04b; --good: #58c08a; --bad: #ef7d70; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 17px; margin: 34px 0 10px; }
h3 { font-size: 14px; margin: 14px 0 4px; color: var(--soft); font-weight: 600; }
.soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(170px, 1fr)); gap: 12px; margin-top: 18px; }
.card { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: 12px 14px; }
.card b { display: block; font-size: 20px; font-weight: 600; overflow-wrap: anywhere; }
.card span { color: var(--soft); font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 14px; }
.chart { background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: 10px 12px; }
.chart svg { width: 100%; max-width: 640px; height: auto; display: block; margin: 0 auto; }
.chart h3 { margin: 0 0 2px; color: var(--ink); }
.key { font-size: 12.5px; color: var(--soft); margin-right: 14px; white-space: nowrap; display: inline-block; }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; margin-right: 6px; vertical-align: middle;
  background: var(--train); }
.key.held-out::before { background: var(--held); } .key.faint::before { opacity: .35; }
.scroll { overflow: auto; background: var(--card); border: 1px solid var(--edge); border-radius: 8px; }
.tall { max-height: 460px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 13.5px; }
th, td { padding: 6px 12px; text-align: right; border-bottom: 1px solid var(--edge); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child, td.text, th.text { text-align: left; }
td.text { white-space: normal; overflow-wrap: anywhere; } tr:last-child td { border-bottom: 0; }
pre { margin: 0; padding: 12px 14px; font: 12.5px/1.5 ui-monospace, monospace; }
details { margin: 8px 0; } summary { cursor: pointer; padding: 2px 0; }
img { max-width: 100%; height: auto; display: block; border-radius: 4px; background: #fff; }
figure { margin: 0 0 14px; background: var(--card); border: 1px solid var(--edge); border-radius: 8px; padding: 12px; }
figcaption { color: var(--soft); font-size: 13px; margin-top: 6px; }
"""
