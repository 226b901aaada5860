"""How the report's pages look: on a phone, on a desk, on paper, in the dark; one sheet, no scripts, nothing loaded."""

CSS = """
:root{color-scheme:light dark;--ink:#1a1a1a;--soft:#5f5f5f;--line:#dcdcd8;--paper:#fff;--card:#f6f6f3;--good:0,114,178;
--bad:213,94,0}
@media(prefers-color-scheme:dark){:root{--ink:#e8e8e4;--soft:#a9a9a4;--line:#3a3a38;--paper:#161615;--card:#21211f;
--good:64,158,224;--bad:222,114,32}.panels img,section img{filter:invert(.91) hue-rotate(180deg)}}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1280px;margin:0 auto;
padding:1rem;overflow-wrap:anywhere}
header p,figcaption,.notes,summary,.intro{color:var(--soft);font-size:.9rem}.intro{max-width:75ch}
h1{font-size:1.5rem;line-height:1.25;margin:.2rem 0 1rem;text-wrap:balance}
h2{font-size:1.2rem;margin:2.2rem 0 .5rem}h3{font-size:1rem;margin:0 0 .3rem}
a{color:inherit}nav{font-size:.9rem;display:flex;flex-wrap:wrap;gap:.2rem 1rem;margin:1rem 0}
.verdicts{list-style:none;padding:0}.verdicts li{border-left:5px solid var(--soft);padding:.2rem .8rem;margin:.5rem 0}
.verdicts .better{border-color:rgb(var(--good))}.verdicts .worse{border-color:rgb(var(--bad))}
figure{margin:1.2rem 0}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,380px),1fr));gap:.5rem}
img{width:100%;max-width:675px;height:auto;background:#fff;border-radius:6px;display:block}
section img{max-width:440px;margin:.5rem 0}
.scroll{overflow-x:auto;max-width:100%}.tables{display:flex;flex-wrap:wrap;gap:1.2rem 2rem}.tables>div{max-width:100%;
min-width:0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.88rem}
th,td{padding:.25rem .55rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{font-weight:500;color:var(--soft)}th:first-child{text-align:left}tbody th{color:var(--ink);position:sticky;left:0;
background:var(--paper)}
td.up{background:rgba(var(--good),var(--a))}td.down{background:rgba(var(--bad),var(--a))}
td.down.judged::before{content:"▾";font-size:.7em;opacity:.75;margin-right:.2em}
td.up.judged::before{content:"▴";font-size:.7em;opacity:.75;margin-right:.2em}
.own{outline:2px solid var(--ink);outline-offset:-3px}
blockquote{margin:.8rem 0;padding:.5rem .8rem;background:var(--card);border-radius:6px;max-width:75ch}
blockquote p{margin:.2rem 0}blockquote small{color:var(--soft);display:block}
pre{overflow-x:auto;font-size:.85rem;background:var(--card);padding:.6rem;border-radius:6px}
@page{margin:12mm}
@media print{:root{--ink:#000;--soft:#444;--line:#ccc;--paper:#fff;--card:#f4f4f1;--good:0,114,178;--bad:213,94,0}
body{max-width:none;padding:0;font-size:10.5px}nav{display:none}.panels{grid-template-columns:1fr 1fr}
.panels img,section img{filter:none;max-width:100%}
table{font-size:8.5px}th,td{padding:.1rem .3rem}tbody th{position:static}
.scroll{overflow:visible}pre{white-space:pre-wrap}
td,blockquote{print-color-adjust:exact;-webkit-print-color-adjust:exact}
.panels img,.tables>div,blockquote,tr{break-inside:avoid}h2,h3{break-after:avoid}}
"""
