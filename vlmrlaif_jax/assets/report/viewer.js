"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);

// Creates an element with attributes and children. Texts are never parsed as HTML.
const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== ""));
  return element;
};
const number = (x) => (x === null || x === undefined ? "none" : String(+x.toPrecision(3)).replace("-", "−"));
const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

// The theme: the system's, light or dark.
const themes = ["auto", "light", "dark"];
const loadTheme = () => { try { return localStorage.getItem("theme"); } catch { return null; } };
const setTheme = (theme) => {
  document.documentElement.dataset.theme = theme;
  at("theme").textContent = `theme: ${theme}`;
  try { localStorage.setItem("theme", theme); } catch { /* Storage may be disabled for local files. */ }
};
setTheme(themes.includes(loadTheme()) ? loadTheme() : "auto");
at("theme").addEventListener("click", () => {
  setTheme(themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % 3]);
});

// Differences between texts by words, from the longest common subsequence.
const words = (text) => text.match(/\s*(?:[\p{L}\p{N}'’-]+|[^\s])/gu) ?? [];
const same = (a, b) => a.trim() === b.trim();
const common = (old, now) => {
  const table = Array.from({ length: old.length + 1 }, () => new Uint16Array(now.length + 1));
  for (let i = old.length - 1; i >= 0; i--) {
    for (let j = now.length - 1; j >= 0; j--) {
      table[i][j] = same(old[i], now[j]) ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
    }
  }
  return table;
};
const difference = (old, now) => {
  const [a, b] = [words(old), words(now)];
  const table = common(a, b);
  const parts = [];
  const put = (tag, word) => {
    const last = parts[parts.length - 1];
    if (last && last[0] === tag) last[1] += word;
    else parts.push([tag, word]);
  };
  let [i, j] = [0, 0];
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && same(a[i], b[j])) { put("span", b[j++]); i++; }
    else if (i < a.length && (j === b.length || table[i + 1][j] >= table[i][j + 1])) put("del", a[i++]);
    else put("ins", b[j++]);
  }
  return parts.map(([tag, text]) => make(tag, {}, text));
};
// Returns the most similar of several texts.
const nearest = (texts, text) => {
  const share = (other) => {
    const [a, b] = [words(other), words(text)];
    return (2 * common(a, b)[0][0]) / Math.max(a.length + b.length, 1);
  };
  return texts.reduce((best, other) => (share(other) > share(best) ? other : best));
};

// Answers are compared with the first of their group, or with the prompt's first step.
const earlier = (source, group) => source.groups.find((other) => other.id === group.id && other.step < group.step);
const baseline = (source, group) => {
  if (group.in_order) return { name: group.answers[0].name, texts: [group.answers[0].text], own: true };
  const first = source.by_round ? undefined : earlier(source, group);
  return first ? { name: `step ${first.step}`, texts: first.answers.map((answer) => answer.text), own: false } : null;
};
const hasChanged = (source, group) => {
  const old = baseline(source, group);
  return old !== null && group.answers.some((answer) => !old.texts.includes(answer.text));
};

const hasFault = (group) => group.answers.some((a) => a.notes.some((note) => !note.startsWith("not in the video")));
const wrong = (answer) => answer.right === false || answer.mistakes > 0;
const right = (answer) => answer.right === true || answer.mistakes === 0;
const ONLY = {
  "all": () => true,
  "cut off or without a score": (source, group) => hasFault(group),
  "followed through the steps": (source, group) => group.followed === true,
  "changed": hasChanged,
  "a wrong answer": (source, group) => group.answers.some(wrong),
  "all answers right": (source, group) => group.answers.every(right),
  "best score on a wrong answer": (source, group) => wrong(group.answers[0]) && group.answers.some(right),
  "with a denied claim": (source, group) => group.answers.some((a) => (a.claims || []).some(([, holds]) => holds === false)),
  "at steps with an alarm": (source, group) => (data.alarms[source.name] || []).some((step) => near(source, step) === group.step),
};
// Returns the first step with samples at or after another step.
const near = (source, step) => steps(source).find((known) => known >= step) ?? steps(source).at(-1);
const steps = (source) => [...new Set(source.groups.map((group) => group.step))];

const player = (clip, name) => {
  if (!clip || clip.error) return make("div", { class: "none" }, clip ? clip.error : "no video");
  const picture = (frame) => {
    const image = make("img", { src: clip.uri, alt: "", loading: "lazy" });
    image.style.objectPosition = `${clip.frames > 1 ? (100 * frame) / (clip.frames - 1) : 0}% 0`;
    return image;
  };
  let [now, timer] = [0, null];
  const screen = picture(0);
  const caption = make("span", {}, "▶ play");
  const show = (frame) => {
    now = frame;
    screen.style.objectPosition = `${clip.frames > 1 ? (100 * frame) / (clip.frames - 1) : 0}% 0`;
    thumbs.forEach((thumb, i) => thumb.setAttribute("aria-pressed", i === frame));
  };
  const stop = () => { clearInterval(timer); timer = null; caption.textContent = "▶ play"; };
  const play = () => {
    if (timer) { stop(); return; }
    caption.textContent = "❚❚ stop";
    timer = setInterval(() => (box.isConnected ? show((now + 1) % clip.frames) : stop()), 200);
  };
  const button = make("button", { class: "player", type: "button", "aria-label": `play the clip of ${name}`, onclick: play }, screen, caption);
  const thumbs = [...Array(clip.frames).keys()].map((frame) =>
    make("button", { type: "button", tabindex: -1, "aria-label": `frame ${frame + 1}`, onclick: () => { if (timer) stop(); show(frame); } }, picture(frame)));
  for (const each of [button, ...thumbs]) each.style.aspectRatio = `${clip.width} / ${clip.height}`;
  const box = make("div", { class: "clip" }, button, make("div", { class: "thumbs" }, ...thumbs));
  show(0);
  return box;
};

const mark = (answer) => {
  if (right(answer)) return make("span", { class: "right" }, "✓ right");
  if (!wrong(answer)) return null;
  return make("span", { class: "wrong" }, answer.mistakes > 0 ? `✗ ${plural(answer.mistakes, "mistake")}` : "✗ wrong");
};
const terms = (answer) => {
  // Each term is shown weighted, and raw in parentheses if that differs.
  const raw = answer.raw_terms || {};
  const differs = (name, x) => raw[name] !== undefined && raw[name] !== x;
  const parts = Object.entries(answer.terms || {}).filter(([name, x]) => x || raw[name]);
  if (parts.length === 0 || (parts.length === 1 && !differs(...parts[0]))) return "";
  return ` = ${parts.map(([name, x]) => `${name} ${number(x)}${differs(name, x) ? ` (raw ${number(raw[name])})` : ""}`).join(", ")}`;
};
const worth = (answer, scores) => {
  // Shown within one group only, because runs have different judges.
  const [low, high] = [Math.min(...scores), Math.max(...scores)];
  if (scores.length < 2 || high === low || typeof answer.score !== "number") return null;
  const bar = make("span", { class: "worth", "aria-hidden": true }, make("i"));
  bar.firstChild.style.width = `${(100 * (answer.score - low)) / (high - low)}%`;
  return bar;
};
const claims = (answer, open) => {
  if ((answer.claims || []).length === 0) return null;
  const count = (holds) => answer.claims.filter((claim) => claim[1] === holds).length;
  const verdicts = [[true, "✓", "accepted"], [false, "✗", "denied"], [null, "?", "not checked"]];
  const summary = verdicts.filter(([holds]) => count(holds)).map(([holds, sign, verdict]) => `${sign} ${count(holds)} ${verdict}`);
  return make("details", { class: "claims", open }, make("summary", {}, `claims: ${summary.join(", ")}`), make("ul", {},
    ...answer.claims.map(([text, holds]) => {
      const [, sign, verdict] = verdicts.find(([each]) => each === holds);
      return make("li", { class: holds === false ? "no" : null }, `${sign} ${verdict}: ${text}`);
    })));
};

const answerBlock = (answer, old, scores, open) => {
  const skip = old === null || !at("diff").checked || (old.own && answer.name === old.name);
  const base = skip ? null : nearest(old.texts, answer.text);
  const head = make("h4", {},
    answer.name ? make("b", {}, answer.name) : null,
    answer.side ? make("b", {}, answer.side) : null,
    mark(answer),
    worth(answer, scores),
    answer.score === undefined || answer.score === null ? null : make("span", {}, `score ${number(answer.score)}${terms(answer)}`),
    answer.advantage === undefined || answer.advantage === null ? null : make("span", {}, `advantage ${number(answer.advantage)}`),
    answer.kl === undefined || answer.kl === null ? null : make("span", {}, `KL ${number(answer.kl)}`),
    answer.count > 1 ? make("span", {}, `sampled ${answer.count} times`) : null,
    base !== null && base === answer.text ? make("span", {}, `equal to ${old.own ? "" : "an answer at "}${old.name}`) : null,
    ...answer.notes.map((note) => make("span", { class: "note" }, note)));
  const text = base === null || base === answer.text ? [answer.text] : difference(base, answer.text);
  return make("div", { class: "answer" }, head, make("p", {}, ...(answer.text || base ? text : ["(empty)"])), claims(answer, open));
};

const card = (source, group) => {
  const old = baseline(source, group);
  const scores = group.in_order ? [] : group.answers.map((answer) => answer.score).filter((x) => typeof x === "number");
  const tags = [group.kind && String(group.kind).replaceAll("_", " "), group.followed && "followed through the steps"].filter(Boolean);
  const replies = (group.judge || []).length === 0 ? null : make("details", { class: "quote", open: group.judge.length < 3 },
    make("summary", {}, "replies of the judge"), ...group.judge.map((reply) => make("p", {}, reply)));
  return make("article", { class: "card", tabindex: -1, "data-id": group.id, "aria-label": group.question },
    player(data.clips[group.clip], group.id),
    make("div", {},
      make("span", { class: "tag" }, tags.join(" · ")),
      make("p", { class: `question${group.question.length > 200 ? " long" : ""}` }, group.question),
      group.truth ? make("p", { class: "quote" }, `Truth: ${group.truth}`) : null,
      group.narrative ? make("p", { class: "quote" }, `Context of the judge: ${group.narrative}`) : null,
      ...group.answers.map((answer) => answerBlock(answer, old, scores, group.answers.length < 3)),
      group.hidden ? make("p", { class: "quote" }, `${plural(group.hidden, "answer")} in the middle left out.`) : null,
      replies));
};

// The viewer shows the groups of a source at a step that pass the filters.
const viewer = () => {
  let source = data.sources[0];
  const options = (select, names) => select.replaceChildren(...names.map((name) => make("option", {}, name)));
  const limits = () => [at("least").value === "" ? -Infinity : +at("least").value, at("most").value === "" ? Infinity : +at("most").value];

  const passes = (group) => {
    const text = at("text").value.trim().toLowerCase();
    const [least, most] = limits();
    const texts = [group.question, ...group.answers.map((answer) => answer.text)].join("\n").toLowerCase();
    const bounded = least !== -Infinity || most !== Infinity;
    return texts.includes(text)
      && (at("kind").selectedIndex <= 0 || String(group.kind) === at("kind").value)
      && (!bounded || group.answers.some((a) => typeof a.score === "number" && a.score >= least && a.score <= most))
      && ONLY[at("only").value](source, group);
  };

  const facts = (step) => {
    const now = source.means[step] || {};
    const start = source.means[steps(source)[0]] || {};
    const parts = [["score", "mean score", 1, ""], ["kl", "KL", 1, ""], ["truth", "right", 100, " %"], ["has_stop", "ended with EOS", 100, " %"],
      ["valid", "with a score", 100, " %"]].filter(([key]) => typeof now[key] === "number");
    return parts.map(([key, label, scale, unit]) => {
      const change = typeof start[key] === "number" ? scale * (now[key] - start[key]) : 0;
      const since = change ? ` (${change > 0 ? "+" : "−"}${number(Math.abs(change))} since step ${steps(source)[0]})` : "";
      return make("li", {}, make("span", {}, `${label} `), make("b", {}, `${number(scale * now[key])}${unit}`), make("span", {}, since));
    }).concat(now.answers ? [make("li", {}, make("span", {}, "of "), make("b", {}, plural(now.answers, "answer")))] : []);
  };

  const show = () => {
    const all = steps(source);
    const step = all[at("slide").value];
    const word = source.by_round ? "round" : "step";
    at("step").textContent = `${word} ${step}`;
    at("slide").setAttribute("aria-valuetext", `${word} ${step}`);
    const here = source.groups.filter((group) => group.step === step);
    const matches = here.filter(passes);
    at("means").replaceChildren(...facts(step));
    // A focused prompt keeps the focus when the step changes.
    const focused = document.activeElement.closest(".card")?.dataset.id;
    at("cards").replaceChildren(...matches.map((group) => card(source, group)));
    const cards = [...at("cards").children];
    const next = cards.find((each) => each.dataset.id === focused) ?? cards[0];
    if (next) next.tabIndex = 0;
    if (next && focused !== undefined) next.focus();
    const rest = source.left_out ? `; ${plural(source.left_out, "more prompt")} of this stage left out to limit the page's size; all are in ${source.file}` : "";
    at("count").textContent = `${matches.length} of ${plural(here.length, "prompt")} shown${rest}.`;
  };

  const choose = (next) => {
    source = next;
    for (const tab of at("sources").children) tab.setAttribute("aria-pressed", tab.dataset.name === source.name);
    const kinds = [...new Set(source.groups.map((group) => group.kind).filter(Boolean))].map(String).sort();
    options(at("kind"), ["all", ...kinds]);
    at("kinds").hidden = kinds.length < 2;
    options(at("only"), Object.keys(ONLY).filter((name) => name === "all" || source.groups.some((group) => ONLY[name](source, group))));
    const scored = source.groups.some((group) => group.answers.some((answer) => typeof answer.score === "number"));
    document.querySelectorAll("label.worth").forEach((label) => { label.hidden = !scored; });
    at("slide").max = Math.max(steps(source).length - 1, 0);
    at("slide").value = at("slide").max;
    at("slide").hidden = steps(source).length < 2;
    at("slider").hidden = at("slide").hidden && steps(source)[0] === 0; // The source has no steps.
    show();
  };

  const turn = (by) => {
    at("slide").value = +at("slide").value + by;
    show();
  };
  const walk = (by) => {
    const cards = [...at("cards").children];
    const now = cards.indexOf(document.activeElement.closest(".card"));
    const next = cards[now < 0 ? 0 : Math.min(Math.max(now + by, 0), cards.length - 1)];
    if (!next) return;
    cards.forEach((each) => { each.tabIndex = each === next ? 0 : -1; });
    next.focus();
    next.scrollIntoView({ block: "nearest" });
  };

  at("sources").append(...data.sources.map((each) => make("button",
    { type: "button", "data-name": each.name, onclick: () => choose(each) }, `${each.title} (${each.groups.length})`)));
  at("sources").hidden = data.sources.length < 2;
  at("slide").addEventListener("input", show);
  at("filters").addEventListener("input", show);
  at("filters").addEventListener("submit", (event) => event.preventDefault());
  at("filters").addEventListener("reset", () => setTimeout(show));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
    const inside = event.target.closest(".card");
    const keys = { ArrowLeft: () => turn(-1), ArrowRight: () => turn(1), j: () => walk(1), k: () => walk(-1) };
    const within = { ArrowDown: () => walk(1), ArrowUp: () => walk(-1), p: () => inside.querySelector(".player")?.click() };
    const act = keys[event.key] || (inside && within[event.key]);
    if (!act) return;
    event.preventDefault();
    act();
  });
  // A link at an alarm leads to the answers of its step.
  document.querySelectorAll("[data-to]").forEach((link) => link.addEventListener("click", () => {
    const next = data.sources.find((each) => each.name === link.dataset.to);
    choose(next);
    at("slide").value = Math.max(steps(next).indexOf(near(next, +link.dataset.at)), 0);
    show();
  }));
  choose(data.sources.find((each) => steps(each).length > 1) ?? source);
};
if (data.sources.length) viewer();
