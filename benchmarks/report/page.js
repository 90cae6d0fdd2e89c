"use strict";
// The page can be read without this script, which sorts, filters and answers which model to ship.
(() => {
  const one = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const page = one("main");
  const body = one("#table tbody");
  const number = (text) => (text === "" || text === undefined ? null : Number(text));

  const models = [...body.rows].map((row) => ({
    name: row.dataset.model,
    row,
    kl: Number(row.dataset.kl),
    speed: Number(row.dataset.speed),
    size: Number(row.dataset.size),
    memory: Number(row.dataset.memory),
    beaten: row.dataset.beaten !== undefined,
  }));
  const parts = new Map(models.map((model) => [model.name, all("[data-model]").filter(
    (part) => part.dataset.model === model.name)]));

  // --- the table ---------------------------------------------------------------------------------

  const heads = all("#table thead th");
  const key = (row, column) => {
    const text = row.children[column].dataset.value;
    return text === "" ? null : column === 0 ? text : Number(text);
  };
  heads.forEach((head, column) => one("button", head).addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...[...body.rows].sort((a, b) => {
      const [x, y] = [key(a, column), key(b, column)];
      if (x === null || y === null) return (x === null) - (y === null);
      return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
    }));
  }));

  // --- the model behind a disc ----------------------------------------------------------------------

  const about = one("#about");
  const light = (name, on) => parts.get(name).forEach((part) => part.classList.toggle("lit", on));
  const withCopy = (make) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      const text = one("pre", make).textContent;
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(one("pre", make));
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
    make.append(button);
  };
  const showModel = (name) => {
    const card = all(".roads > li").find((item) => item.dataset.card === name);
    const copy = card.cloneNode(true);
    all(".make button", copy).forEach((button) => button.remove());
    all("details", copy).forEach((part) => { part.open = true; });
    all(".make", copy).forEach(withCopy);
    about.dataset.shown = name;
    about.replaceChildren(...copy.children);
  };
  all(".roads .make").forEach(withCopy);
  for (const [name, ownParts] of parts) {
    for (const part of ownParts) {
      part.addEventListener("pointerenter", () => light(name, true));
      part.addEventListener("pointerleave", () => light(name, false));
      if (!part.closest(".picture")) continue;
      part.addEventListener("pointerenter", () => showModel(name));
      part.addEventListener("click", () => showModel(name));
      if (!part.classList.contains("disc")) continue;
      part.addEventListener("focus", () => { light(name, true); showModel(name); });
      part.addEventListener("blur", () => light(name, false));
      part.addEventListener("keydown", (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        showModel(name);
      });
    }
  }

  // --- which one to ship -------------------------------------------------------------------------

  // The same rule as benchmarks/report/shipping.py: the closest model that fits; of equally close ones
  // the one with the least memory, then the fastest.
  const sameNats = Number(page.dataset.sameNats);
  const sameRatio = Number(page.dataset.sameRatio);
  const best = (memory, speed) => {
    const fits = models.filter((model) => (memory === null || model.memory <= memory)
      && (speed === null || model.speed >= speed));
    if (!fits.length) return null;
    const closest = Math.min(...fits.map((model) => model.kl));
    const reach = closest + Math.max(sameNats, sameRatio * closest);
    return fits.filter((model) => model.kl <= reach)
      .reduce((a, b) => (b.memory - a.memory || a.speed - b.speed) < 0 ? b : a);
  };
  const figureText = (model, column) => {
    const cell = all("td", model.row).find((part) => part.dataset.key === column);
    return `${cell.dataset.text} ${cell.dataset.unit}`;
  };
  const inMegabytes = (value) => `${Math.ceil(value).toLocaleString("en")} MB`;
  const memoryInput = one("#ship-memory");
  const speedInput = one("#ship-speed");
  const answer = one("#ship-answer");
  const chips = one("#ship-chips");
  const words = (text) => document.createTextNode(text);
  const strong = (text) => {
    const part = document.createElement("b");
    part.textContent = text;
    return part;
  };
  const ship = () => {
    const memory = number(memoryInput.value);
    const speed = number(speedInput.value);
    const chosen = best(memory, speed);
    models.forEach((model) => parts.get(model.name).forEach(
      (part) => part.classList.toggle("shipped", model === chosen)));
    answer.dataset.model = chosen ? chosen.name : "";
    if (chosen) {
      answer.replaceChildren(words("Ship "), strong(chosen.name), words(
        `: the closest to ${page.dataset.reference} that fits. KL ${chosen.row.dataset.klText} nats, `
        + `writes ${figureText(chosen, "decode_tokens_per_second")}, takes `
        + `${figureText(chosen, "peak_memory_mb")} of memory and ${figureText(chosen, "size_mb")} on disk.`));
    } else {
      const fast = models.filter((model) => speed === null || model.speed >= speed);
      const nearest = fast.length
        ? fast.reduce((a, b) => (b.memory < a.memory ? b : a))
        : models.reduce((a, b) => (b.speed > a.speed ? b : a));
      answer.replaceChildren(words("None of them fits. "), words(fast.length ? "The least memory is taken by " : "The fastest is "),
        strong(nearest.name), words(`: ${figureText(nearest, fast.length ? "peak_memory_mb" : "decode_tokens_per_second")}.`));
    }
    const steps = [];
    for (const amount of models.map((model) => model.memory).sort((a, b) => a - b)) {
      const step = best(amount, speed);
      if (step && (!steps.length || steps.at(-1).model !== step)) steps.push({ amount, model: step });
    }
    chips.replaceChildren(...steps.map(({ amount, model }) => {
      const chip = document.createElement("button");
      const from = document.createElement("small");
      from.textContent = `from ${inMegabytes(amount)} `;
      chip.type = "button";
      chip.append(from, words(model.name));
      chip.setAttribute("aria-pressed", String(model === chosen));
      chip.addEventListener("click", () => {
        memoryInput.value = String(Math.ceil(amount));
        ship();
        one(`#ship-chips button[aria-pressed=true]`)?.focus();
      });
      return chip;
    }));
    return chosen;
  };
  memoryInput.addEventListener("input", ship);
  speedInput.addEventListener("input", ship);

  // --- the size filter --------------------------------------------------------------------------

  const slider = one("#size-slider");
  const sizeInput = one("#size-most");
  const frontierOnly = one("#frontier-only");
  const stairs = (picture) => {
    let closest = Infinity;
    const discs = all("circle.disc[data-model]:not(.out)", picture)
      .map((disc) => ({ x: disc.cx.baseVal.value, y: disc.cy.baseVal.value }))
      .sort((a, b) => b.x - a.x || a.y - b.y)
      .filter(({ y }) => y < closest && ((closest = y), true));
    const corners = discs.slice(0, 1);
    for (let place = 1; place < discs.length; place += 1) {
      corners.push({ x: discs[place].x, y: discs[place - 1].y }, discs[place]);
    }
    one(".frontier", picture).setAttribute("points", discs.length < 2 ? ""
      : corners.map(({ x, y }) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" "));
  };
  const filter = () => {
    const most = number(sizeInput.value);
    let shown = 0;
    for (const model of models) {
      const out = (most !== null && model.size > most) || (frontierOnly.checked && model.beaten);
      shown += out ? 0 : 1;
      model.row.hidden = out;
      parts.get(model.name).forEach((part) => {
        part.classList.toggle("out", out);
        if (part.classList.contains("disc")) part.setAttribute("tabindex", out ? "-1" : "0");
      });
    }
    one("#shown").textContent = `${shown} of ${models.length} models`;
    all(".picture").forEach(stairs);
  };
  slider.addEventListener("input", () => {
    sizeInput.value = Number(slider.value) >= Number(slider.max) ? "" : slider.value;
    filter();
  });
  sizeInput.addEventListener("input", () => {
    slider.value = sizeInput.value === "" ? slider.max : sizeInput.value;
    filter();
  });
  frontierOnly.addEventListener("change", filter);

  all("[data-needs-script]").forEach((part) => { part.hidden = false; });
  const first = ship() ?? models[0];
  showModel(first.name);
  filter();
})();
