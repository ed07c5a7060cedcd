// Gives the figures of class "explorer" their controls, a drawing, and a line that says what is shown. All that they
// show stands in the page as JSON (lib/expvae_book/explorers.py); nothing is fetched. Lets a keyboard scroll outputs.
"use strict";
(() => {
  const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const short = (value) => (value === 0 ? "0" : value.toPrecision(3));

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  let controlCount = 0;

  // A labelled select, or a labelled slider whose value is read as a text; `state` gets the index that is chosen.
  function control(given, index, state, changed) {
    const id = `explorer-control-${controlCount++}`;
    const texts = given.options || given.values;
    state[index] = given.start || 0;
    const input = given.options
      ? element("select", { id }, ...texts.map((text, at) => element("option", { value: at }, text)))
      : element("input", { id, type: "range", min: 0, max: texts.length - 1, step: 1 });
    input.value = state[index];
    const said = element("span", { class: "explorer-value", "aria-hidden": "true" });
    const update = () => {
      state[index] = Number(input.value);
      if (given.options) return;
      said.textContent = texts[state[index]];
      input.setAttribute("aria-valuetext", texts[state[index]]);
    };
    input.addEventListener("input", () => { update(); changed(); });
    update();
    return element("div", { class: "explorer-control" }, element("label", { for: id }, given.label), input, said);
  }

  // Paint `shape` pixels whose colours (red, green, blue) `colour` tells by their place.
  function paint(canvas, [height, width], colour) {
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    for (let at = 0; at < height * width; at++) image.data.set([...colour(at), 255], 4 * at);
    context.putImageData(image, 0, 0);
  }

  function drawing(title) {
    const canvas = element("canvas", { role: "img", "aria-label": title });
    const below = element("div", { class: "explorer-title" }, title);
    return { canvas, below, box: element("div", { class: "explorer-drawing" }, canvas, below) };
  }

  function scale(colours) {
    const bar = drawing("Colour scale");
    paint(bar.canvas, [1, 256], (at) => colours.subarray(3 * at, 3 * at + 3));
    const low = element("span"), high = element("span");
    bar.below.replaceChildren(low, high);
    bar.box.classList.add("explorer-scale");
    const put = (span, value) => { span.textContent = typeof value === "string" ? value : short(value); };
    return { box: bar.box, set(from, to) { put(low, from); put(high, to); } };
  }

  // The map numbered `at` of what `embedded` of the module gives: values in its unit.
  function mapAt({ shape, peaks, bytes: text }, at) {
    const size = shape[0] * shape[1];
    const values = Array.from(bytes(text).subarray(at * size, (at + 1) * size), (byte) => (byte / 255) * peaks[at]);
    return { shape, values, least: Math.min(...values), greatest: Math.max(...values) };
  }

  function coloured(canvas, map, colours, from, to) {
    paint(canvas, map.shape, (at) => {
      const share = to > from ? Math.min(Math.max((map.values[at] - from) / (to - from), 0), 1) : 0;
      const place = 3 * Math.round(255 * share);
      return colours.subarray(place, place + 3);
    });
  }

  const kinds = {
    maps(spec, colours, stage) {
      const map = drawing("Map"), bar = scale(colours);
      stage.append(map.box, bar.box);
      return ([digit, which, network, ownScale], texts) => {
        const given = spec.maps[texts[2]][which];
        const shown = mapAt(given, digit);
        const [from, to] = ownScale ? [shown.least, shown.greatest] : [0, given.top];
        coloured(map.canvas, shown, colours, from, to);
        bar.set(from, to);
        map.below.textContent = `digit ${texts[0]}, ${texts[2]}`;
        return `Digit ${texts[0]}, ${texts[1]}, ${texts[2]} network: greatest value ${short(shown.greatest)}; ` +
          `the scale runs from ${short(from)} to ${short(to)}.`;
      };
    },

    threshold(spec, colours, stage) {
      const map = drawing("Map"), flagged = drawing("Flagged cells of the layer"), bar = scale(colours);
      const body = element("tbody");
      const heads = ["Pixels of", ...Object.keys(spec.ious).map((name) => `IoU, ${name}`), "times as high"];
      const row = element("tr", {}, ...heads.map((name) => element("th", { scope: "col" }, name)));
      const table = element("table", {}, element("thead", {}, row), body);
      stage.append(map.box, flagged.box, bar.box, table);
      return ([image, threshold], texts) => {
        const shown = mapAt(spec.maps, image);
        const top = Math.max(...spec.maps.peaks);
        coloured(map.canvas, shown, colours, 0, top);
        bar.set(0, top);
        // As many cells of the layer as the record flags pixels of the image: their shares agree.
        const share = spec.flagged[image][threshold];
        const count = Math.round(share * shown.values.length);
        const cut = count ? [...shown.values].sort((a, b) => b - a)[count - 1] : Infinity;
        paint(flagged.canvas, shown.shape, (at) => (shown.values[at] >= cut ? [255, 255, 255] : [0, 0, 0]));
        const all = spec.flagged.length - 1;
        const lines = [[texts[0], image], ["all test images", all]].map(([name, at]) => {
          const [one, both] = Object.values(spec.ious).map((of) => of[at][threshold]);
          return [name, one, both, one > 0 ? `${(both / one).toPrecision(2)} times` : "one is 0"];
        });
        body.replaceChildren(...lines.map(([name, one, both, times]) => element(
          "tr", {}, element("th", { scope: "row" }, name), ...[one, both].map((value) => element(
            "td", {}, value.toFixed(3), element("span", { class: "explorer-bar", style: `width: ${6 * value}rem` }),
          )), element("td", {}, times),
        )));
        const told = lines.map(([name, one, both, times]) =>
          `${name}: ${one.toFixed(3)} for the anomalous class, ${both.toFixed(3)} for both (${times})`);
        return `Threshold ${texts[1]} flags ${(100 * share).toFixed(1)} % of the pixels of ${texts[0]}, whose map ` +
          `has a greatest value of ${short(shown.greatest)}. IoU, ${told.join("; ")}.`;
      };
    },

    traversal(spec, colours, stage) {
      const values = spec.controls[1].values.length;
      const panels = spec.sheets.map((sheet) => {
        const panel = { ...drawing(sheet.title), sheet, image: new Image() };
        panel.image.src = sheet.source;
        stage.append(panel.box);
        if (sheet.maps) {
          panel.map = drawing(`${sheet.title}: map of that latent`);
          stage.append(panel.map.box);
        }
        return panel;
      });
      const bar = scale(colours);
      if (panels.some(({ map }) => map)) stage.append(bar.box);
      return ([latent, place, ownScale], texts) => {
        bar.set(...(ownScale ? ["least of the map", "greatest of the map"] : ["0", "greatest of its model"]));
        const told = panels.map(({ canvas, image, below, sheet, map }) => {
          image.decode().then(() => {
            const size = image.width / values;
            canvas.width = canvas.height = size;
            canvas.getContext("2d").drawImage(image, place * size, latent * size, size, size, 0, 0, size, size);
          });
          const named = `${sheet.title}, ${sheet.labels[latent]}`;
          below.textContent = named;
          if (!map) return named;
          const seen = mapAt(sheet.maps, latent * values + place);
          const [from, to] = ownScale ? [seen.least, seen.greatest] : [0, Math.max(...sheet.maps.peaks)];
          coloured(map.canvas, seen, colours, from, to);
          return `${named}, its map's greatest value ${short(seen.greatest)}`;
        });
        return `At ${texts[1]}: ${told.join("; ")}.` + (texts[2] ? ` Colour scale ${texts[2]}.` : "");
      };
    },
  };

  function explore(figure) {
    const spec = JSON.parse(figure.querySelector("script").textContent);
    const stage = element("div", { class: "explorer-stage" });
    const live = element("p", { class: "explorer-live", "aria-live": "polite" });
    const state = [];
    const draw = kinds[spec.kind](spec, bytes(spec.colours), stage);
    const changed = () => {
      live.textContent = draw(state, spec.controls.map((given, at) => (given.options || given.values)[state[at]]));
    };
    const controls = spec.controls.map((given, at) => control(given, at, state, changed));
    figure.append(element("div", { class: "explorer-controls" }, ...controls), stage, live);
    changed();
  }

  // On a phone outputs scroll sideways in a box of their own (book.css), which a keyboard has to reach.
  function reach() {
    for (const box of document.querySelectorAll("div.cell_output")) {
      const scrolls = box.scrollWidth > box.clientWidth;
      const given = { tabindex: 0, role: "group", "aria-label": "Output that scrolls sideways" };
      for (const [name, value] of Object.entries(given)) {
        if (scrolls) box.setAttribute(name, value);
        else box.removeAttribute(name);
      }
    }
  }

  document.addEventListener("DOMContentLoaded", () => document.querySelectorAll("figure.explorer").forEach(explore));
  for (const event of ["load", "resize"]) window.addEventListener(event, reach);
  document.addEventListener("toggle", reach, true); // what was folded has no width
})();
