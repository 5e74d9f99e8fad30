// The keys of the explorer, and what keeps them away from the notebook around it.
//
// Each press is counted in the trait `presses`. A count that grows survives what ipywidgets does
// while the kernel is busy: of several changes it sends the latest only.

const KEYS = ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "h", "b", "t"];
const WRITES = "input[type=text], textarea, select, [contenteditable=true]";

function render({ model, el }) {
  const stop = new AbortController();

  function press(key) {
    const presses = model.get("presses");
    model.set("presses", { ...presses, [key]: (presses[key] ?? 0) + 1 });
    model.save_changes();
  }

  function connect(explorer) {
    const options = { signal: stop.signal, capture: true };
    explorer.tabIndex = 0;
    const takeFocus = () => explorer.focus({ preventScroll: true });

    explorer.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "Escape" && event.target !== explorer) {
        takeFocus();
        event.stopPropagation();
        return;
      }
      if (event.target.matches(WRITES)) return;
      const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
      if (!KEYS.includes(key)) return;
      event.preventDefault();
      event.stopPropagation();
      press(key);
    }, options);

    // A letter that is typed in here is not for the notebook: “a” would insert a cell, “d d” delete
    // one. What is pressed with Ctrl goes on to it. Escape gives it the keys back.
    explorer.addEventListener("keydown", (event) => {
      if (event.key === "Escape") explorer.blur();
      else if (!(event.ctrlKey || event.metaKey || event.altKey)) event.stopPropagation();
    }, { signal: stop.signal });

    // A click anywhere makes the keys work, and so does a choice that has been made.
    explorer.addEventListener("click", (event) => {
      if (!event.target.matches(`${WRITES}, option`)) takeFocus();
    }, { signal: stop.signal });
    explorer.addEventListener("change", (event) => {
      if (event.target.matches("select, input[type=checkbox]")) takeFocus();
    }, { signal: stop.signal });
  }

  // The widget is drawn before it is put into the explorer, and the explorer into the page.
  function findExplorer() {
    if (stop.signal.aborted) return;
    const explorer = el.closest(".probekit-explorer");
    if (explorer) connect(explorer);
    else requestAnimationFrame(findExplorer);
  }

  findExplorer();
  return () => stop.abort();
}

export default { render };
