"""The page's style sheet: one column, system fonts, light and dark by what the reader's system asks for."""

from ard_jax.report.figures import PALETTE


def _variables(which: int) -> str:
    return "".join(f"--{name}:{colours[which]};" for name, colours in PALETTE.items())


CSS = (
    f":root{{{_variables(0)}}}\n@media (prefers-color-scheme: dark){{:root{{{_variables(1)}}}}}"
    + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
  font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:56px 24px 96px}
h1{font-size:1.05rem;font-weight:600;color:var(--soft);margin:0 0 14px;overflow-wrap:anywhere}
h2{font-size:1.3rem;font-weight:650;letter-spacing:-.01em;margin:0 0 14px}
section{margin-top:56px;padding-top:28px;border-top:1px solid var(--rule)}
p{max-width:46em;margin:0 0 14px}
.lead{font-size:clamp(1.3rem,2.6vw,1.75rem);line-height:1.3;font-weight:600;letter-spacing:-.015em;max-width:30em;
  margin-bottom:28px;text-wrap:pretty}
.note,figcaption,caption{color:var(--soft);font-size:.875rem;line-height:1.5}
.absent{color:var(--soft);font-style:italic}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:20px;margin:0 0 26px}
.tiles div{border-top:3px solid;padding-top:10px}
.tiles strong{display:block;font-size:1.9rem;line-height:1.15;font-weight:600;letter-spacing:-.02em;
  font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.tiles span{color:var(--soft);font-size:.85rem;line-height:1.35;display:block}
figure{margin:0 0 32px;min-width:0}
figcaption{margin-bottom:12px;max-width:54em}
figcaption b{color:var(--ink);font-weight:600}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.875rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding-bottom:8px}
th,td{padding:8px 0 8px 14px;text-align:right;border-bottom:1px solid var(--rule);vertical-align:bottom}
td{white-space:nowrap}
thead th{font-weight:500;color:var(--soft);font-size:.8rem;line-height:1.3}
tbody th{font-weight:600}
th:first-child{text-align:left;padding-left:0;position:sticky;left:0;background:var(--paper)}
#points table{max-width:46rem}
.scroll table{margin-bottom:12px}
#measurements table{min-width:60em}
#measurements td{white-space:pre}
#measurements tbody th,#measurements td{vertical-align:top}
.finals{display:grid;grid-template-columns:9.5rem repeat(var(--n),minmax(34px,1fr));gap:4px;align-items:center;
  min-width:min-content}
.finals img,.progression img{display:block;width:100%;height:auto}
.name{font-size:.85rem;line-height:1.25;font-weight:600;padding-right:10px;position:sticky;left:0;
  background:var(--paper);align-self:stretch;display:flex;flex-direction:column;justify-content:center;
  overflow-wrap:anywhere}
.name small,.name.note{font-weight:400;color:var(--soft);font-size:.78rem}
.class{font-size:.78rem;color:var(--soft);text-align:center}
.steps{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr));gap:28px 36px}
.progression{display:grid;grid-template-columns:7rem repeat(var(--n),minmax(0,1fr));gap:4px;align-items:center}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(440px,100%),1fr));gap:12px 40px;margin-top:22px}
.charts figure{max-width:640px;margin-bottom:16px}
.charts figcaption{margin-bottom:4px}
.charts svg{display:block;width:100%;height:auto}
.charts svg text{font-family:inherit!important}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 18px;margin:0 0 8px;padding:0;font-size:.82rem}
.legend span{display:inline-block;width:22px;vertical-align:middle;margin-right:7px;border-top:2.5px solid}
.legend .dashed{border-top-style:dashed}
.times{max-width:46em}
.times th,.times td{vertical-align:middle}
.times .bar{width:60%}
.times i{display:block;height:10px;background:var(--ard);border-radius:1px;min-width:1px}
.times .total th,.times .total td{font-weight:600;border-bottom:0}
summary{cursor:pointer}
pre{font:.8rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-x:auto;border:1px solid var(--rule);
  padding:16px;border-radius:4px}
@media (min-width:601px){tbody th{white-space:nowrap}}
@media (max-width:600px){
  main{padding:32px 16px 64px}
  section{margin-top:40px;padding-top:22px}
  .tiles{grid-template-columns:1fr 1fr}
  .finals{grid-template-columns:6.4rem repeat(var(--n),minmax(38px,1fr))}
  .progression{grid-template-columns:5.6rem repeat(var(--n),minmax(0,1fr))}
  .name{font-size:.74rem}
  .name small,.name.note{font-size:.7rem}
  .times .bar{width:40%}
}
"""
)
