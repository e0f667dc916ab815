// Swaps the page's main part whenever the server sends it anew. The page is complete without this.
(() => {
  "use strict";
  const main = document.querySelector("main");
  const lamp = document.querySelector("#lamp");
  if (!main || !main.dataset.live) return;
  // The key opened the page; it need not stay in the address bar.
  const here = new URL(location.href);
  if (here.searchParams.delete("key"), here.href !== location.href) {
    history.replaceState(null, "", here.pathname + here.search);
  }
  const state = (name, text) => { lamp.className = name; lamp.title = text; lamp.textContent = text; };
  const source = new EventSource(main.dataset.live);
  source.onopen = () => state("live", "live");
  source.onerror = () => state("lost", "reconnecting");
  source.onmessage = (event) => {
    // What a reader has open, typed or scrolled stays as it is.
    const open = new Set([...main.querySelectorAll("details[open]")].map((d) => d.id));
    const scroll = new Map([...main.querySelectorAll("pre[id]")].map((p) =>
      [p.id, p.scrollTop + p.clientHeight >= p.scrollHeight - 4 ? -1 : p.scrollTop]));
    const focus = document.activeElement && document.activeElement.id;
    if (String(getSelection())) return;
    main.innerHTML = event.data;
    for (const id of open) { const d = document.getElementById(id); if (d) d.open = true; }
    for (const p of main.querySelectorAll("pre[id]")) {
      const top = scroll.get(p.id);
      p.scrollTop = top === undefined || top < 0 ? p.scrollHeight : top;
    }
    if (focus) { const f = document.getElementById(focus); if (f) f.focus(); }
  };
  for (const p of main.querySelectorAll("pre[id]")) p.scrollTop = p.scrollHeight;
})();
