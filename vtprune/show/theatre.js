// The token theatre: draws what theatre.py computed. Data reaches the page through textContent, properties and pixels only, never as HTML.
(() => {
  const KINDS = ["image", "pixels", "vision", "projector", "llm"];
  const GROUPS = ["", "pixels", "vision tower", "projector", "language model, layers"];
  const HEAT = [[13, 8, 135], [126, 3, 168], [204, 71, 120], [248, 149, 64], [240, 249, 33]];
  const KEPT = 0, MERGED = 1, DROPPED = 2, BACK = 3, GONE = 4;
  const kind = (site) => KINDS.indexOf(site.split(".")[0]);
  const order = (site) => kind(site) * 10000 + Number(site.split(".")[1] || 0);

  function make(tag, name, parent, text) {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    if (parent) parent.append(node);
    return node;
  }

  // A bright colour per slot; neighbours get hues far apart (render.color).
  const color = (slot) => {
    const h = ((slot * 0.61803398875) % 1) * 6;
    const part = (n) => { const k = (n + h) % 6; return Math.round(255 * (1 - 0.85 * Math.max(0, Math.min(k, 4 - k, 1)))); };
    return `rgb(${part(5)} ${part(3)} ${part(1)})`;
  };

  const warm = (t) => {
    const at = Math.min(t * 4, 3.999), i = Math.floor(at);
    return `rgb(${HEAT[i].map((v, k) => Math.round(v + (HEAT[i + 1][k] - v) * (at - i))).join(" ")})`;
  };

  // One line per stage, as theatre.history.
  function history(scene, token) {
    const lines = scene.stages.map((stage, i) => {
      const before = scene.states[i][token], after = scene.states[i + 1][token], what = stage.outcome[token];
      let why = `${stage.tokens_in} to ${stage.tokens_out} tokens`;
      const who = before >= 0 ? before : token; // a merged token goes the way of the one that it was merged into
      if (stage.rank && stage.rank[who]) {
        const [ranked, kept] = stage.units[stage.unit[who]];
        why = `${who === token ? "" : `token ${who} has `}rank ${stage.rank[who]} of ${ranked}, score ${stage.scores[who]}, ${kept} kept`;
      }
      const end = { [KEPT]: "kept", [BACK]: "came back", [GONE]: "was already gone" };
      end[MERGED] = before === after ? `still part of token ${after}` : `merged into token ${after}`;
      end[DROPPED] = before === token ? "dropped" : `dropped with token ${before}`;
      return [`${stage.site} ${stage.method}: ${why}: ${end[what]}`, what === GONE];
    });
    return lines.length ? lines : [["no stage: every layer sees this token", false]];
  }

  class Theatre extends HTMLElement {
    static observedAttributes = ["data-scenes"];

    connectedCallback() { this.live = true; this.build(); }
    disconnectedCallback() { this.live = false; clearInterval(this.timer); this.watch?.disconnect(); }
    attributeChangedCallback() { if (this.live) this.build(); }

    build() {
      if (!this.dataset.scenes) return; // they come with a later attribute
      const { pictures, scenes } = JSON.parse(this.dataset.scenes);
      const labels = new Map(scenes.flatMap((s) => s.steps.map((p) => [p.site, p.label])));
      this.axis = [...labels.keys()].sort((a, b) => order(a) - order(b)).map((site) => ({ site, label: labels.get(site) }));
      this.pictures = pictures.map((url) => { const image = new Image(); image.onload = () => this.draw(); image.src = url; return image; });
      clearInterval(this.timer);
      this.raster = 0; this.timer = null;
      this.watch?.disconnect();
      this.watch = new ResizeObserver(() => this.draw());
      this.replaceChildren();
      this.controls(scenes);
      const row = make("div", "vt-scenes", this);
      this.scenes = scenes.map((scene) => this.stage(scene, row));
      this.details = make("div", "vt-details", this);
      this.details.setAttribute("aria-live", "polite");
      this.forget();
      this.where = make("span", "vt-where", this);
      this.where.setAttribute("aria-live", "polite");
      this.go(this.opening());
    }

    // Where the story is best seen first: the last cut that leaves some tokens, else the last cut, else the end.
    opening() {
      const cuts = this.axis.map((_, i) => i).filter((i) => this.scenes.some((s) => s.acts(i).some((n) => s.data.stages[n].tokens_out < s.data.stages[n].tokens_in)));
      const some = cuts.filter((i) => this.scenes.some((s) => s.acts(i).some((n) => s.data.stages[n].tokens_out > 0)));
      return some.at(-1) ?? cuts.at(-1) ?? this.axis.length - 1;
    }

    controls(scenes) {
      const box = make("div", "vt-controls", this);
      this.button = make("button", "vt-play", box, "Play");
      this.button.type = "button";
      this.button.onclick = () => (this.timer ? this.pause() : this.play());
      const label = make("label", "vt-slide", box, "Step");
      this.slider = Object.assign(make("input", "vt-step", label), { type: "range", min: 0, max: this.axis.length - 1, step: 1 });
      this.slider.oninput = () => { this.pause(); this.go(Number(this.slider.value)); };
      this.output = make("output", "vt-now", box);
      const heat = make("label", "", box);
      this.heat = Object.assign(make("input", "vt-heat", heat), { type: "checkbox", disabled: !scenes.some((s) => s.stages.some((g) => g.rank)) });
      heat.append("score heat map");
      this.legend = make("span", "vt-legend", box, "ranked last");
      make("i", "", this.legend);
      this.legend.append("first");
      this.heat.onchange = () => this.go(this.step);
      const rasters = make("span", "vt-rasters", box), many = Math.max(...scenes.map((s) => s.rasters.length));
      rasters.hidden = many < 2;
      const turn = (name, by) => {
        const node = make("button", by < 0 ? "vt-prev" : "vt-next", rasters, by < 0 ? "‹" : "›");
        node.type = "button";
        node.setAttribute("aria-label", name);
        node.onclick = () => { this.raster = (this.raster + by + many) % many; this.forget(); this.go(this.step); };
      };
      turn("previous picture", -1);
      this.which = make("span", "vt-which", rasters);
      this.which.setAttribute("aria-live", "polite");
      turn("next picture", 1);
    }

    stage(data, row) {
      const box = make("section", "vt-scene", row);
      if (data.title) make("h3", "", box, data.title);
      const canvas = make("canvas", "vt-picture", box);
      canvas.tabIndex = 0;
      canvas.setAttribute("role", "application");
      canvas.onclick = (e) => {
        const r = this.here(data), area = canvas.getBoundingClientRect();
        const y = Math.floor(((e.clientY - area.top) / area.height) * r.rows), x = Math.floor(((e.clientX - area.left) / area.width) * r.columns);
        this.choose(Math.min(y, r.rows - 1) * r.columns + Math.min(x, r.columns - 1));
      };
      canvas.onkeydown = (e) => this.key(e, data);
      canvas.onfocus = canvas.onblur = () => this.draw();
      this.watch.observe(canvas);
      const scene = { data, box, canvas, caption: make("p", "vt-caption", box), note: make("p", "vt-note", box), bars: [] };
      scene.at = this.axis.map(({ site }) => data.steps.findLastIndex((p) => order(p.site) <= order(site)));
      scene.acts = (i) => (data.steps[scene.at[i]].site === this.axis[i].site ? data.steps[scene.at[i]].stages : []);
      const bars = make("div", "vt-bars", box);
      bars.setAttribute("aria-hidden", "true"); // the slider and the caption tell the same
      KINDS.forEach((_, k) => {
        const mine = this.axis.map((_, i) => i).filter((i) => kind(this.axis[i].site) === k);
        if (!mine.length) return;
        const group = make("div", "vt-group", bars), line = make("div", "vt-row", group), marks = make("div", "vt-marks", group);
        group.style.flexGrow = mine.length;
        for (const i of mine) {
          const count = data.steps[scene.at[i]].tokens, bar = make("button", "vt-bar", line);
          Object.assign(bar, { type: "button", tabIndex: -1, title: `${this.axis[i].label}: ${count} tokens`, onclick: () => { this.pause(); this.go(i); } });
          make("i", "", bar).style.height = `${(100 * count) / data.tokens}%`;
          make("i", scene.acts(i).length ? "vt-cut" : "", marks);
          scene.bars.push(bar);
        }
        make("div", "vt-name", group, mine.length < 5 ? "" : `${GROUPS[k]} ${this.axis[mine[0]].site.split(".")[1]}–${this.axis[mine.at(-1)].site.split(".")[1]}`);
      });
      return scene;
    }

    here(data) { return data.rasters[Math.min(this.raster, data.rasters.length - 1)]; }
    play() {
      if (this.step === this.axis.length - 1) this.go(0);
      const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
      this.button.textContent = "Pause";
      this.timer = setInterval(() => { if (this.step < this.axis.length - 1) this.go(this.step + 1); else this.pause(); }, calm ? 2000 : 700);
    }
    pause() {
      clearInterval(this.timer);
      this.timer = null;
      this.button.textContent = "Play";
    }

    go(step) {
      this.step = step;
      const { site, label } = this.axis[step];
      Object.assign(this.dataset, { step, site });
      this.slider.value = step;
      this.output.textContent = label;
      this.legend.hidden = !this.heat.checked;
      this.which.textContent = this.here(this.scenes.reduce((a, s) => (s.data.rasters.length > a.data.rasters.length ? s : a)).data).label;
      for (const s of this.scenes) {
        const at = s.data.steps[s.at[step]], r = this.here(s.data), owner = s.data.states[at.state];
        const kept = owner.slice(r.start, r.start + r.rows * r.columns).map((o, i) => [o, r.start + i]).filter(([o, t]) => o === t).map(([, t]) => t);
        s.box.dataset.kept = kept.join(",");
        const here = s.data.rasters.length > 1 ? `, ${kept.length} of ${r.rows * r.columns} here` : "";
        const cuts = s.acts(step).map((n) => s.data.stages[n]).map((g) => `${g.method}: ${g.tokens_in} → ${g.tokens_out}`);
        s.caption.textContent = `${label}: ${at.tokens} of ${s.data.tokens} tokens${here}${cuts.length ? " – " + cuts.join(", ") : ""}`;
        s.scored = s.data.stages.slice(0, at.state).findLast((g) => g.rank);
        s.note.textContent = !this.heat.checked ? "" : s.scored ? `coloured by rank in ${s.scored.site} ${s.scored.method}` : "nothing ranked so far";
        s.bars.forEach((bar, i) => (i === step ? bar.setAttribute("aria-current", "step") : bar.removeAttribute("aria-current")));
        s.canvas.setAttribute("aria-label", `${s.data.title} ${r.label}: ${r.rows} rows of ${r.columns} patches. Arrow keys move, Enter tells what happened to a patch.`);
      }
      this.slider.setAttribute("aria-valuetext", this.scenes.map((s) => s.caption.textContent).join("; "));
      this.draw();
    }

    draw() { this.scenes?.forEach((s) => this.paint(s)); }

    paint({ data, canvas, at, scored, bars }) {
      const r = this.here(data), { rows, columns, start } = r, owner = data.states[data.steps[at[this.step]].state];
      canvas.style.width = `min(100%, ${(30 * columns) / rows}rem)`;
      bars[0].closest(".vt-bars").style.maxWidth = `max(18rem, ${(30 * columns) / rows}rem)`;
      canvas.style.aspectRatio = `${columns} / ${rows}`;
      const scale = devicePixelRatio, w = Math.round(canvas.clientWidth * scale), h = Math.round((w * rows) / columns);
      if (!w) return;
      if (canvas.width !== w || canvas.height !== h) Object.assign(canvas, { width: w, height: h });
      const ctx = canvas.getContext("2d"), x = (c) => Math.round((c * w) / columns), y = (c) => Math.round((c * h) / rows), cell = w / columns / scale;
      ctx.fillStyle = "#d9dce1";
      ctx.fillRect(0, 0, w, h);
      const picture = this.pictures[r.picture];
      if (picture?.complete) ctx.drawImage(picture, 0, 0, w, h);
      const cells = Array.from({ length: rows * columns }, (_, i) => ({ t: start + i, c: i % columns, r: Math.floor(i / columns), o: owner[start + i] }));
      const fill = (some, style, mode = "source-over") => {
        ctx.globalCompositeOperation = mode;
        for (const p of some) {
          ctx.fillStyle = typeof style === "function" ? style(p) : style;
          ctx.fillRect(x(p.c), y(p.r), x(p.c + 1) - x(p.c), y(p.r + 1) - y(p.r));
        }
        ctx.globalCompositeOperation = "source-over";
      };
      const rank = this.heat.checked && scored ? scored.rank : null;
      const gone = cells.filter((p) => p.o < 0), hot = rank ? cells.filter((p) => rank[p.t]) : [];
      fill(gone, "#000", "saturation");
      fill(gone.filter((p) => !rank?.[p.t]), "rgb(46 50 58 / 0.78)");
      fill(hot, "#000", "saturation");
      ctx.globalAlpha = 0.7;
      fill(hot, (p) => warm(1 - (rank[p.t] - 1) / Math.max(scored.units[scored.unit[p.t]][0] - 1, 1)));
      ctx.globalAlpha = 1;
      fill(hot.filter((p) => p.o < 0), "rgb(0 0 0 / 0.5)");
      const groups = new Set(owner.filter((o, t) => o >= 0 && o !== t)), side = (p, dr, dc) => {
        const a = p.r + dr, b = p.c + dc;
        return a < 0 || b < 0 || a >= rows || b >= columns ? null : owner[start + a * columns + b];
      };
      for (const p of cells) {
        if (p.o < 0) continue;
        const merged = groups.has(p.o), line = Math.max(1, Math.round((merged && cell >= 12 ? 2 : 1) * scale));
        ctx.fillStyle = merged ? color(p.o) : "rgb(250 250 250)";
        const [l, t, e, b] = [x(p.c), y(p.r), x(p.c + 1), y(p.r + 1)];
        for (const [dr, dc, ...box] of [[-1, 0, l, t, e - l, line], [1, 0, l, b - line, e - l, line], [0, -1, l, t, line, b - t], [0, 1, e - line, t, line, b - t]]) {
          const other = side(p, dr, dc);
          if (merged ? other !== p.o : other !== null && other < 0) ctx.fillRect(...box);
        }
        if (merged && p.o === p.t && cell >= 6) this.dot(ctx, (l + e) / 2, (t + b) / 2, Math.max(2, cell / 7) * scale, scale);
      }
      if (document.activeElement === canvas || this.chosen === this.cursor) {
        const p = cells[this.cursor], frame = (style, inset, width) => {
          Object.assign(ctx, { strokeStyle: style, lineWidth: width * scale });
          ctx.strokeRect(x(p.c) + inset * scale, y(p.r) + inset * scale, x(p.c + 1) - x(p.c) - 2 * inset * scale, y(p.r + 1) - y(p.r) - 2 * inset * scale);
        };
        if (p) { frame("#14161a", 0, 4); frame("#fff", 0, 2); }
      }
    }

    dot(ctx, x, y, radius, scale) {
      ctx.beginPath();
      ctx.arc(x, y, radius, 0, 2 * Math.PI);
      ctx.fill();
      Object.assign(ctx, { strokeStyle: "#191c21", lineWidth: scale });
      ctx.stroke();
    }

    key(e, data) {
      const { rows, columns, start } = this.here(data), c = this.cursor % columns, r = Math.floor(this.cursor / columns);
      const moves = { ArrowLeft: [r, c - 1], ArrowRight: [r, c + 1], ArrowUp: [r - 1, c], ArrowDown: [r + 1, c], Home: [r, 0], End: [r, columns - 1] };
      if (e.key === "Enter" || e.key === " ") this.choose(this.cursor);
      else if (moves[e.key]) {
        const [a, b] = moves[e.key].map((v, i) => Math.max(0, Math.min(v, (i ? columns : rows) - 1)));
        this.cursor = a * columns + b;
        const token = start + this.cursor, now = this.scenes.map((s) => s.data.states[s.data.steps[s.at[this.step]].state][token]);
        const states = now.map((o) => (o === undefined ? "not there" : o < 0 ? "gone" : o === token ? "kept" : `part of token ${o}`));
        this.where.textContent = `row ${a + 1}, column ${b + 1}, token ${token}: ${states.join(", ")}`;
        this.draw();
      } else return;
      e.preventDefault();
    }

    forget() {
      this.cursor = 0;
      this.chosen = null;
      this.details.replaceChildren();
      make("p", "", this.details, "Choose a patch to read what happened to it.");
    }

    // Patch number `patch` of the shown raster: its history in every scene.
    choose(patch) {
      this.cursor = this.chosen = patch;
      const first = this.here(this.scenes[0].data), row = Math.floor(patch / first.columns) + 1;
      this.details.replaceChildren();
      make("p", "", this.details, `Token ${first.start + patch}: row ${row}, column ${(patch % first.columns) + 1} of ${first.label}`);
      const told = make("div", "vt-told", this.details);
      for (const { data } of this.scenes) {
        const r = this.here(data), box = make("div", "", told);
        if (data.title) make("h4", "", box, data.title);
        const list = make("ol", "", box);
        const lines = patch < r.rows * r.columns ? history(data, r.start + patch) : [["this picture has no such patch", true]];
        for (const [text, quiet] of lines) make("li", quiet ? "vt-quiet" : "", list, text);
      }
      this.draw();
    }
  }

  if (!customElements.get("vt-theatre")) customElements.define("vt-theatre", Theatre);
})();
