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

  // `token`, and where it is if that is another raster than that of `from`, as theatre.history.
  const named = (scene, token, from) => `token ${token}${token < 0 || scene.of[token] === scene.of[from] ? "" : ` (${scene.rasters[scene.of[token]].label})`}`;

  // One line per stage, as theatre.history.
  function history(scene, token) {
    const lines = scene.stages.map((stage, i) => {
      const before = scene.states[i][token], after = scene.states[i + 1][token], what = stage.outcome[token];
      let why = `${stage.tokens_in} to ${stage.tokens_out} tokens`;
      const who = before >= 0 ? before : token; // a merged token goes the way of the one that it was merged into
      if (stage.rank && stage.rank[who]) {
        const [ranked, kept] = stage.units[stage.unit[who]];
        why = `${who === token ? "" : `${named(scene, who, token)} has `}rank ${stage.rank[who]} of ${ranked}, score ${stage.scores[who]}, ${kept} kept`;
      }
      const end = { [KEPT]: "kept", [BACK]: "came back", [GONE]: "was already gone" };
      end[MERGED] = `${before === after ? "still part of" : "merged into"} ${named(scene, after, token)}`;
      end[DROPPED] = before === token ? "dropped" : `dropped with ${named(scene, before, token)}`;
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
      for (const scene of scenes) {
        scene.states.forEach((owner, i) => { scene.states[i] = owner ?? scene.states[i - 1]; });
        scene.of = scene.rasters.flatMap((r, i) => Array(r.rows * r.columns).fill(i)); // the raster of each token
        scene.moves = scene.rasters.some((r) => r.film !== null);
      }
      const labels = new Map(scenes.flatMap((s) => s.steps.map((p) => [p.site, p.label])));
      this.axis = [...labels.keys()].sort((a, b) => order(a) - order(b)).map((site) => ({ site, label: labels.get(site) }));
      this.pictures = pictures.map((url) => { const image = new Image(); image.onload = () => this.draw(); image.src = url; return image; });
      clearInterval(this.timer);
      this.raster = 0; this.timer = this.active = null;
      this.watch?.disconnect();
      this.watch = new ResizeObserver(() => this.draw());
      this.replaceChildren();
      this.controls(scenes);
      const row = make("div", "vt-scenes", this);
      this.legendOf(scenes);
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
      this.button.onclick = () => this.play(this.button, () => this.step, this.axis.length, (i) => this.go(i));
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
      this.long = scenes.reduce((a, s) => (s.rasters.length > a.rasters.length ? s : a));
      const many = this.long.rasters.length, rasters = make("div", "vt-rasters", box);
      rasters.hidden = many < 2;
      this.reel = make("button", "vt-reel", rasters, "Play frames");
      Object.assign(this.reel, { type: "button", hidden: !this.long.moves });
      this.reel.onclick = () => this.play(this.reel, () => this.raster, many, (i) => this.turn(i));
      const turn = (name, by) => {
        const node = make("button", by < 0 ? "vt-prev" : "vt-next", rasters, by < 0 ? "‹" : "›");
        node.type = "button";
        node.setAttribute("aria-label", name);
        node.onclick = () => { this.pause(); this.turn((this.raster + by + many) % many); };
      };
      const word = this.long.moves ? "frame" : "picture";
      turn(`previous ${word}`, -1);
      const film = make("label", "vt-slide", rasters, word[0].toUpperCase() + word.slice(1));
      this.time = Object.assign(make("input", "vt-time", film), { type: "range", min: 0, max: many - 1, step: 1 });
      this.time.oninput = () => { this.pause(); this.turn(Number(this.time.value)); };
      turn(`next ${word}`, 1);
      this.which = make("output", "vt-which", rasters);
    }

    // What the drawing means, as far as these scenes have it.
    legendOf(scenes) {
      const list = make("ul", "vt-key", this), some = (what) => scenes.some((s) => s.stages.some((g) => g.outcome.includes(what)));
      make("li", "vt-kept", list, "kept");
      if (some(DROPPED)) make("li", "vt-gone", list, "dropped");
      if (some(MERGED)) make("li", "vt-merged", list, "merged: one colour is one token, the dot is its place");
    }

    stage(data, row) {
      const box = make("section", "vt-scene", row);
      if (data.title) make("h2", "", box, data.title);
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
      const strip = make("div", "vt-strip", box);
      strip.setAttribute("aria-hidden", "true"); // slider and caption tell the same
      strip.hidden = !data.moves;
      strip.classList.toggle("vt-many", data.rasters.length > 16);
      const frames = data.moves ? data.rasters.map((r, i) => {
        const node = make("button", "vt-frame", strip);
        Object.assign(node, { type: "button", tabIndex: -1, onclick: () => { this.pause(); this.turn(i); } });
        const small = make("canvas", "", node);
        small.style.aspectRatio = `${r.columns} / ${r.rows}`;
        return { node, small, count: make("span", "", node) };
      }) : [];
      const scene = { data, box, canvas, frames, caption: make("p", "vt-caption", box), note: make("p", "vt-note", box), bars: [] };
      scene.at = this.axis.map(({ site }) => data.steps.findLastIndex((p) => order(p.site) <= order(site)));
      scene.acts = (i) => (data.steps[scene.at[i]].site === this.axis[i].site ? data.steps[scene.at[i]].stages : []);
      const word = make("p", "vt-word", box);
      make("span", "", word, `visual tokens, site by site (of ${data.tokens})`);
      if (data.stages.length) make("span", "vt-mark", word, "tokens cut");
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
    play(button, where, many, go) {
      const playing = this.active === button;
      this.pause();
      if (playing) return;
      if (where() === many - 1) go(0);
      const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
      Object.assign(this, { active: button, idle: button.textContent });
      button.textContent = "Pause";
      this.timer = setInterval(() => { if (where() < many - 1) go(where() + 1); else this.pause(); }, calm ? 2000 : 700);
    }
    pause() {
      clearInterval(this.timer);
      if (this.active) this.active.textContent = this.idle;
      this.timer = this.active = null;
    }

    // Shows raster number `raster`; the cursor stays where it is if that is as large.
    turn(raster) {
      const size = () => { const r = this.here(this.long); return `${r.rows} ${r.columns}`; }, before = size(), cursor = this.cursor;
      this.raster = raster;
      this.forget();
      if (size() === before) this.cursor = cursor;
      this.go(this.step);
    }

    go(step) {
      this.step = step;
      const { site, label } = this.axis[step];
      Object.assign(this.dataset, { step, site });
      this.slider.value = step;
      this.output.textContent = label;
      this.legend.hidden = !this.heat.checked;
      this.which.textContent = this.here(this.long).label;
      this.time.value = this.raster;
      for (const s of this.scenes) {
        const at = s.data.steps[s.at[step]], r = this.here(s.data), owner = s.data.states[at.state];
        const left = s.data.rasters.map((f) => owner.slice(f.start, f.start + f.rows * f.columns).map((o, i) => [o, f.start + i]).filter(([o, t]) => o === t).map(([, t]) => t));
        const mine = s.data.of[r.start], kept = left[mine];
        s.box.dataset.kept = kept.join(",");
        const away = owner.filter((o, t) => o >= 0 && s.data.of[t] === mine && s.data.of[o] !== mine).length;
        const where = away ? `, ${away} hatched: part of tokens in other ${s.data.moves ? "frames" : "pictures"}` : "";
        const here = s.data.rasters.length > 1 ? `, ${kept.length} of ${r.rows * r.columns} here${where}` : "";
        s.frames.forEach(({ node, count }, i) => {
          const f = s.data.rasters[i], all = f.rows * f.columns;
          count.textContent = s.frames.length > 16 ? left[i].length : `${left[i].length}/${all}`;
          node.title = `${f.label}: ${left[i].length} of ${all} tokens`;
          if (f === r) node.setAttribute("aria-current", "true"); else node.removeAttribute("aria-current");
        });
        const cuts = s.acts(step).map((n) => s.data.stages[n]).map((g) => `${g.method}: ${g.tokens_in} → ${g.tokens_out}`);
        s.caption.textContent = `${label}: ${at.tokens} of ${s.data.tokens} tokens${here}${cuts.length ? " – " + cuts.join(", ") : ""}`;
        s.scored = s.data.stages.slice(0, at.state).findLast((g) => g.rank);
        s.note.textContent = !this.heat.checked ? "" : s.scored ? `coloured by rank in ${s.scored.site} ${s.scored.method}` : "nothing ranked so far";
        s.bars.forEach((bar, i) => (i === step ? bar.setAttribute("aria-current", "step") : bar.removeAttribute("aria-current")));
        s.canvas.setAttribute("aria-label", `${s.data.title} ${r.label}: ${r.rows} rows of ${r.columns} patches. Arrow keys move, Enter tells what happened to a patch${s.data.rasters.length > 1 ? ", Page Up and Page Down turn" : ""}.`);
      }
      this.slider.setAttribute("aria-valuetext", this.scenes.map((s) => s.caption.textContent).join("; "));
      this.time.setAttribute("aria-valuetext", `${this.which.textContent}: ${this.scenes.map((s) => s.caption.textContent).join("; ")}`);
      this.draw();
    }

    draw() { this.scenes?.forEach((s) => this.paint(s)); }

    paint(scene) {
      const { data, canvas, frames } = scene, r = this.here(data), { rows, columns } = r;
      canvas.style.width = `min(100%, ${(85 * columns) / rows}vh)`;
      canvas.style.aspectRatio = `${columns} / ${rows}`;
      const owner = data.states[data.steps[scene.at[this.step]].state];
      const groups = new Set(owner.filter((o, t) => o >= 0 && o !== t)), part = this.tokens(canvas, data, r, owner, groups, scene.scored, null);
      const told = this.chosen === null ? undefined : owner[r.start + this.chosen]; // of the chosen patch: marked in all frames
      frames.forEach(({ small }, i) => this.tokens(small, data, data.rasters[i], owner, groups, scene.scored, { told }));
      if (part && (document.activeElement === canvas || this.chosen === this.cursor)) {
        const { ctx, cells, scale, x, y } = part, p = cells[this.cursor], frame = (style, inset, width) => {
          Object.assign(ctx, { strokeStyle: style, lineWidth: width * scale });
          ctx.strokeRect(x(p.c) + inset * scale, y(p.r) + inset * scale, x(p.c + 1) - x(p.c) - 2 * inset * scale, y(p.r + 1) - y(p.r) - 2 * inset * scale);
        };
        if (p) { frame("#14161a", 0, 4); frame("#fff", 0, 2); }
      }
    }

    // Draws one raster. `small`: without lines, the group of the token `told` marked.
    tokens(canvas, data, r, owner, groups, scored, small) {
      const { rows, columns, start } = r, scale = devicePixelRatio, w = Math.round(canvas.clientWidth * scale), h = Math.round((w * rows) / columns);
      if (!w) return null;
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
      const rank = this.heat.checked && scored ? scored.rank : null, home = data.of[start];
      const gone = cells.filter((p) => p.o < 0), hot = rank ? cells.filter((p) => rank[p.t]) : [], away = cells.filter((p) => p.o >= 0 && data.of[p.o] !== home);
      fill(gone, "#000", "saturation");
      fill(gone.filter((p) => !rank?.[p.t]), "rgb(46 50 58 / 0.78)");
      fill(hot, "#000", "saturation");
      ctx.globalAlpha = 0.7;
      fill(hot, (p) => warm(1 - (rank[p.t] - 1) / Math.max(scored.units[scored.unit[p.t]][0] - 1, 1)));
      ctx.globalAlpha = 1;
      fill(hot.filter((p) => p.o < 0), "rgb(0 0 0 / 0.5)");
      fill(away, "rgb(46 50 58 / 0.55)");
      if (small) {
        if (small.told >= 0) fill(cells.filter((p) => p.o === small.told), "#ffe14d");
        return null;
      }
      const side = (p, dr, dc) => {
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
      for (const p of away) this.hatch(ctx, x(p.c), y(p.r), x(p.c + 1), y(p.r + 1), color(p.o), scale);
      return { ctx, cells, scale, x, y };
    }

    // Two diagonals: what stands here is part of a token of another raster.
    hatch(ctx, l, t, e, b, style, scale) {
      ctx.beginPath();
      for (const k of [0.5, 1]) {
        ctx.moveTo(l + (e - l) * (k - 0.5), b);
        ctx.lineTo(e, t + (b - t) * (k - 0.5));
      }
      Object.assign(ctx, { strokeStyle: style, lineWidth: Math.max(1, scale) });
      ctx.stroke();
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
      const many = this.long.rasters.length;
      if (many > 1 && (e.key === "PageDown" || e.key === "PageUp")) this.turn((this.raster + (e.key === "PageDown" ? 1 : many - 1)) % many);
      else if (e.key === "Enter" || e.key === " ") this.choose(this.cursor);
      else if (moves[e.key]) {
        const [a, b] = moves[e.key].map((v, i) => Math.max(0, Math.min(v, (i ? columns : rows) - 1)));
        this.cursor = a * columns + b;
        const token = start + this.cursor, states = this.scenes.map((s) => {
          const o = s.data.states[s.data.steps[s.at[this.step]].state][token];
          return o === undefined ? "not there" : o < 0 ? "gone" : o === token ? "kept" : `part of ${named(s.data, o, token)}`;
        });
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
        if (data.title) make("h3", "", box, data.title);
        const list = make("ol", "", box);
        const lines = patch < r.rows * r.columns ? history(data, r.start + patch) : [["this picture has no such patch", true]];
        for (const [text, quiet] of lines) make("li", quiet ? "vt-quiet" : "", list, text);
      }
      this.draw();
    }
  }

  if (!customElements.get("vt-theatre")) customElements.define("vt-theatre", Theatre);
})();
