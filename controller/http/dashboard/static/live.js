// Follows the page's stream: says when it is live, and says since when it is not.
// The swapping itself is htmx's; without this file the page is a plain page.
(() => {
  "use strict";
  const QUIET_MS = 12000; // the server speaks every 5 s
  const state = document.getElementById("live-state");
  const stale = document.getElementById("stale");
  let heard = 0;
  let since = null;

  const clock = (ms) => new Date(ms).toISOString().slice(11, 19);

  function alive() {
    heard = Date.now();
    since = null;
    if (state && state.textContent !== "Live") {
      state.hidden = false;
      state.textContent = "Live";
      state.classList.remove("off");
    }
    if (stale && !stale.hidden) stale.hidden = true;
  }

  function lost() {
    if (document.hidden || since !== null) return;
    since = heard || Date.now();
    if (state) {
      state.hidden = false;
      state.textContent = "Not live";
      state.classList.add("off");
    }
    if (stale) {
      stale.hidden = false;
      stale.textContent = `Stale since ${clock(since)} UTC: the server does not answer. ` +
        "What you see may have changed; this page follows again by itself.";
    }
  }

  document.addEventListener("htmx:sse:after:connection", alive);
  document.addEventListener("htmx:sse:before:message", alive);
  document.addEventListener("htmx:sse:error", lost);
  setInterval(() => { if (heard && Date.now() - heard > QUIET_MS) lost(); }, 1000);
  // The browser was away: whatever stands here is old until the stream speaks again.
  document.addEventListener("visibilitychange", () => { if (!document.hidden) heard = Date.now(); });
})();
