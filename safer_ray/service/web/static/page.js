// What the page does beyond its forms and links: texts that show by a button, results without a reload, tables that sort, a download.
(() => {
  "use strict";
  const say = (text) => { document.getElementById("said").textContent = text; };

  const veil = (box) => {
    const label = box.querySelector("label.reveal");
    if (!label) return;
    const button = document.createElement("button");
    const [word, of] = label.querySelectorAll("span");
    const hidden = word.textContent;
    button.type = "button";
    button.className = "reveal";
    button.append(word, of);
    const show = (shown) => {
      box.classList.toggle("shown", shown);
      word.textContent = shown ? "Blur text" : hidden;
      for (const secret of box.querySelectorAll(".secret")) {
        secret.inert = !shown;
        secret.setAttribute("aria-hidden", String(!shown));
      }
    };
    button.addEventListener("click", () => {
      const shown = !box.classList.contains("shown");
      show(shown);
      say(shown ? "The text shows." : "The text is blurred.");
    });
    box.addEventListener("click", (event) => {
      if (box.classList.contains("shown") || event.target.closest("button, a, summary, label")) return;
      const hit = [...box.querySelectorAll(".secret")].some((secret) => [...secret.getClientRects()].some((at) =>
        at.left <= event.clientX && event.clientX <= at.right && at.top <= event.clientY && event.clientY <= at.bottom));
      if (hit) button.click();
    });
    label.replaceWith(button);
    show(false);
  };

  const sortable = (table) => {
    const body = table.tBodies[0];
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      if (!head.dataset.sort) return;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") === "descending";
        const value = (row) => row.cells[column].dataset.value;
        const numbers = head.dataset.sort === "number";
        const order = (a, b) => numbers ? (Number(value(a)) || 0) - (Number(value(b)) || 0) : value(a).localeCompare(value(b));
        const rows = [...body.rows].sort((a, b) => up ? order(a, b) : order(b, a));
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        body.append(...rows);
        say(`Sorted by ${button.textContent}, ${up ? "ascending" : "descending"}.`);
      });
    });
  };

  const scored = (block) => {
    const rows = JSON.parse(block.textContent);
    const download = document.getElementById("download");
    if (download) download.hidden = false;
    download?.addEventListener("click", () => {
      const file = new Blob(rows.map((row) => JSON.stringify(row) + "\n"), { type: "application/jsonl" });
      const link = document.createElement("a");
      link.href = URL.createObjectURL(file);
      link.download = block.dataset.name;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60000);
      say(`${rows.length} rows downloaded.`);
    });
    const byLine = new Map(rows.map((row) => [row.safer_ray.line, row]));
    const form = document.getElementById("explain");
    document.querySelectorAll(".why").forEach((cell) => { cell.hidden = false; });
    document.querySelectorAll(".why button").forEach((button) => {
      const row = byLine.get(Number(button.dataset.line));
      button.hidden = !row;
      button.addEventListener("click", () => {
        form.elements.row.value = JSON.stringify(row);
        form.submit();
      });
    });
  };

  const busy = (form, waiting) => {
    form.setAttribute("aria-busy", String(waiting));
    form.querySelectorAll("button:not([type=button])").forEach((button) => button.setAttribute("aria-disabled", String(waiting)));
    tell(form, waiting ? form.dataset.wait : "");
  };

  const tell = (form, text) => {
    const line = form.querySelector(".waiting") || form.querySelector(".actions").appendChild(document.createElement("span"));
    line.className = "waiting hint";
    line.textContent = text;
    if (text) say(text);
  };

  const swapIn = (text) => {
    const page = new DOMParser().parseFromString(text, "text/html");
    const main = page.getElementById("main");
    if (!main) throw new Error("no page");
    document.title = page.title;
    document.getElementById("main").replaceWith(main);
    start(document.getElementById("main"));
    const target = ["[aria-invalid=true]", ".notice[role=alert]", "#verdict", "h1"].map((s) => document.querySelector(s)).find(Boolean);
    target.setAttribute("tabindex", target.getAttribute("tabindex") || (target.matches("textarea") ? "0" : "-1"));
    window.scrollTo(0, 0);
    target.focus();
    say(target.matches("textarea") ? document.querySelector(".error").textContent : target.textContent.trim());
  };

  const scoring = (form) => {
    form.addEventListener("submit", async (event) => {
      if (form.getAttribute("aria-busy") === "true") { event.preventDefault(); return; }
      const file = form.enctype === "multipart/form-data";
      if (file) { if (event.submitter?.value === "file") tell(form, form.dataset.wait); else busy(form, true); return; }
      event.preventDefault();
      busy(form, true);
      try {
        const answer = await fetch(form.action, { method: "POST", body: new URLSearchParams(new FormData(form)), redirect: "follow" });
        swapIn(await answer.text());
      } catch {
        busy(form, false);
        tell(form, "The service gives no answer; try again.");
      }
    });
  };

  const start = (root) => {
    root.querySelectorAll(".veil").forEach(veil);
    root.querySelectorAll("table.sortable").forEach(sortable);
    root.querySelectorAll("form[data-wait]").forEach(scoring);
    const swap = root.querySelector("#swap");
    if (swap) {
      swap.hidden = false;
      swap.addEventListener("click", () => {
        const [one, two] = [document.getElementById("chosen"), document.getElementById("rejected")];
        [one.value, two.value] = [two.value, one.value];
        say("The responses are swapped.");
      });
    }
    const block = root.querySelector("#rows");
    if (block) scored(block);
  };

  document.documentElement.classList.add("js");
  start(document);
  window.addEventListener("pageshow", () => document.querySelectorAll("form[aria-busy=true]").forEach((form) => busy(form, false)));
})();
