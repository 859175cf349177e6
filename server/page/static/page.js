// The page asks /api/status again and again while it is visible, and follows the viewer's own clip by its events.
// Whatever comes from callers (prompts, names, errors) goes into the page as text, never as HTML.

const POLL_MS = 2000;
const WORDS = {
  JOB_STATE_QUEUED: "waiting", JOB_STATE_CONDITIONING: "encoding the inputs", JOB_STATE_DENOISING: "denoising",
  JOB_STATE_DECODING: "decoding", JOB_STATE_ENCODING: "writing the file", JOB_STATE_SUCCEEDED: "done",
  JOB_STATE_FAILED: "failed", JOB_STATE_CANCELLED: "cancelled",
};
const FINAL = ["JOB_STATE_SUCCEEDED", "JOB_STATE_FAILED", "JOB_STATE_CANCELLED"];
const $ = (id) => document.getElementById(id);

let mayAct = false;
let filled = "";
let own = null; // the id of the clip that this page asked for
let timer = 0;

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null && child !== ""));
  return element;
}

async function ask(path, options = {}) {
  const answer = await fetch(path, options);
  const body = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(body.message), { violations: body.violations });
  return body;
}

const post = (path, body = {}) =>
  ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

// Seconds of proto3's JSON form of a Duration, "1.500s".
const seconds = (duration) => (duration ? parseFloat(duration) : null);

function clock(value) {
  if (value === null) return "";
  const whole = Math.max(0, Math.round(value));
  return whole < 60 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

function share(job) {
  const at = job.progress ?? {};
  const decode = (at.frames_decoded ?? 0) / (at.total_frames || 1);
  return job.state === "JOB_STATE_SUCCEEDED" ? 1 : 0.9 * ((at.step ?? 0) / (at.total_steps || 1)) + 0.1 * decode;
}

function sentence(job) {
  const at = job.progress ?? {};
  const parts = [WORDS[job.state] ?? job.state];
  if (job.state === "JOB_STATE_QUEUED") parts.push(at.wait_reason || (at.queue_position ? `${at.queue_position} ahead` : "next"));
  if (job.state === "JOB_STATE_DENOISING") parts.push(`step ${at.step ?? 0} of ${at.total_steps}`);
  if (job.state === "JOB_STATE_DECODING") parts.push(`frame ${at.frames_decoded ?? 0} of ${at.total_frames}`);
  if (!FINAL.includes(job.state) && at.eta) parts.push(`${clock(seconds(at.eta))} left`);
  if (job.error) parts.push(job.error.message ?? "");
  return parts.join(", ");
}

function title(job) {
  const styles = (job.clip.styles ?? []).map((style) => `${style.name} ${style.strength ?? 0}`).join(", ");
  const size = `${job.clip.width}×${job.clip.height}, ${job.clip.frames} frames`;
  return [styles, size, job.clip.tokenization?.mode === "CAT" ? "CAT" : ""].filter(Boolean).join(" · ");
}

// Keeps the elements of items that stay, so that focus and playing videos survive an update.
function keep(list, items, key, create, update, empty) {
  const known = new Map([...list.children].filter((child) => child.dataset.key).map((child) => [child.dataset.key, child]));
  const wanted = items.map((item) => {
    const element = known.get(key(item)) ?? create(item);
    element.dataset.key = key(item);
    update(element, item);
    return element;
  });
  if (!wanted.length) wanted.push(make("li", { className: "empty", textContent: empty }));
  if (wanted.length !== list.children.length || wanted.some((element, index) => element !== list.children[index])) list.replaceChildren(...wanted);
}

function showJob(element, { job, picture }) {
  const [image, text, slot] = element.children;
  if (picture) image.src = `data:image/webp;base64,${picture}`;
  image.style.visibility = picture ? "visible" : "hidden";
  text.children[0].textContent = job.clip.prompt ?? "";
  text.children[1].textContent = `${sentence(job)} · ${title(job)}`;
  text.children[2].value = share(job);
  slot.hidden = !mayAct;
}

function createJob({ job }) {
  const cancel = make("button", { type: "button", textContent: "Cancel" });
  cancel.setAttribute("aria-label", `Cancel: ${job.clip.prompt ?? job.job_id}`);
  cancel.addEventListener("click", async () => {
    cancel.disabled = true;
    await post(`api/jobs/${job.job_id}/cancel`).catch(report);
    refresh();
  });
  const bar = make("progress", { max: 1 });
  bar.setAttribute("aria-label", "Progress");
  const text = make("div", { className: "text" }, make("div", { className: "prompt" }), make("div", { className: "quiet" }), bar);
  return make("li", {}, make("img", { alt: "" }), text, cancel);
}

function createClip(job) {
  const frame = make("button", { type: "button", className: "frame" });
  const video = (job.result?.artifacts ?? []).find((artifact) => artifact.mime_type === "video/mp4");
  if (video) {
    frame.setAttribute("aria-label", `Play: ${job.clip.prompt ?? job.job_id}`);
    frame.append(make("img", { src: `api/jobs/${job.job_id}/poster`, alt: "", loading: "lazy" }));
    frame.addEventListener("click", () => {
      const playing = player(job.job_id, video.name);
      frame.replaceWith(make("div", { className: "frame" }, playing));
      playing.focus();
    });
  } else {
    frame.disabled = true;
    frame.textContent = WORDS[job.state];
  }
  const text = job.error ? `${job.clip.prompt ?? ""} (${job.error.message ?? ""})` : job.clip.prompt ?? "";
  return make("li", {}, frame, make("p", { textContent: text }), make("p", { className: "quiet", textContent: title(job) }));
}

function player(jobId, name) {
  const video = make("video", { src: `api/jobs/${jobId}/artifacts/${name}`, controls: true, loop: true, muted: true, playsInline: true });
  video.autoplay = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  return video;
}

function figure(name, value) {
  return make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }));
}

function showPaths(paths) {
  const rate = (path, name, digits) => {
    const found = paths[path];
    return found?.step_seconds ? (found[name] / found.step_seconds).toLocaleString("en", { maximumFractionDigits: digits }) : "–";
  };
  const total = (path, name, digits) => (paths[path]?.[name] ?? 0).toLocaleString("en", { maximumFractionDigits: digits });
  const ratio = (path) => {
    const found = paths[path];
    return found?.tokens_uniform ? (found.tokens / found.tokens_uniform).toFixed(2) : "–";
  };
  const rows = [
    ["tokens a second of steps", (path) => rate(path, "tokens", 0)],
    ["uniform tokens that they stand for, a second", (path) => rate(path, "tokens_uniform", 0)],
    ["tokens over uniform ones", ratio],
    ["frames of finished clips", (path) => total(path, "frames", 0)],
    ["megapixels of finished clips", (path) => total(path, "megapixels", 1)],
  ];
  $("paths").tBodies[0].replaceChildren(
    ...rows.map(([name, value]) =>
      make("tr", {}, make("th", { scope: "row", textContent: name }), ...["uniform", "cat"].map((path) => make("td", { textContent: value(path) })))));
}

function showStyles(styles) {
  keep($("styles"), styles, (style) => `${style.name}@${style.version}`, () => make("li", {}, make("strong"), make("span", { className: "quiet" })), (element, style) => {
    element.children[0].textContent = `${style.name} ${style.version} `;
    element.children[1].textContent = style.compatible ? style.description ?? "" : `cannot be worn: ${style.incompatibility ?? ""}`;
  }, "no styles");
  const names = styles.filter((style) => (style.models ?? []).includes($("model").value));
  const select = $("style");
  const listed = names.map((style) => `${style.name}@${style.version}`).join();
  if (select.dataset.listed !== listed) {
    select.dataset.listed = listed;
    const chosen = select.value;
    select.replaceChildren(make("option", { value: "", textContent: "none" }), ...names.map((style) => make("option", { value: `${style.name}@${style.version}`, textContent: `${style.name} ${style.version}` })));
    select.value = names.some((style) => `${style.name}@${style.version}` === chosen) ? chosen : "";
  }
}

function showModels(models) {
  $("models").textContent = models.map((model) => `${model.name} · ${model.device} · ${model.dtype} · engine ${model.engine}`).join("; ");
  const select = $("model"), names = models.map((model) => model.name);
  if (names.join() !== [...select.options].map((option) => option.value).join()) {
    const chosen = select.value;
    select.replaceChildren(...names.map((name) => make("option", { value: name, textContent: name })));
    select.value = names.includes(chosen) ? chosen : names[0];
  }
  select.parentElement.hidden = models.length < 2;
  const model = models.find((each) => each.name === select.value);
  if (filled === `${model.name} ${model.fingerprint}`) return;
  filled = `${model.name} ${model.fingerprint}`;
  const defaults = model.defaults ?? {};
  for (const name of ["width", "height", "frames", "steps"]) $(name).value = defaults[name] ?? "";
  for (const name of ["width", "height"]) Object.assign($(name), { min: model.limits.min_size, max: model.limits.max_size, step: model.limits.size_multiple });
  Object.assign($("frames"), { max: model.limits.max_frames });
  Object.assign($("steps"), { max: model.limits.max_steps });
}

function show(state) {
  mayAct = state.viewer.may_act;
  const badge = $("ready");
  badge.textContent = state.ready ? "ready" : state.models || filled ? "not ready" : "loading the model";
  badge.className = `badge ${state.ready ? "good" : ""}`;
  $("clip").hidden = !(mayAct && state.models);
  $("read-only").hidden = mayAct;
  for (const name of ["key", "session"]) $(name).classList.toggle("signed-in", mayAct);
  $("key").hidden = mayAct;
  $("key").required = !mayAct;
  document.querySelector("#session > button").hidden = mayAct;
  $("who").hidden = $("sign-out").hidden = !mayAct;
  $("who").textContent = state.viewer.tenant ? `Signed in for ${state.viewer.tenant}` : "Signed in";
  if (!state.models) return;
  showModels(state.models);
  $("counts").replaceChildren(
    figure("running", state.running), figure("previews waiting", state.queue.interactive),
    figure("renders waiting", state.queue.batch), figure("of others", state.others));
  keep($("jobs"), state.jobs, (item) => item.job.job_id, createJob, showJob, "Nothing is being made for you.");
  keep($("recent"), state.recent, (job) => job.job_id, createClip, () => {}, "No clips yet.");
  showPaths(state.throughput);
  showStyles(state.styles);
}

async function refresh() {
  clearTimeout(timer);
  if (document.hidden) return;
  try {
    show(await ask("api/status"));
  } catch {
    $("ready").textContent = "not reachable";
    $("ready").className = "badge bad";
  }
  timer = setTimeout(refresh, POLL_MS);
}

function report(error) {
  const lines = error.violations?.length ? error.violations.map((each) => `${each.field}: ${each.description}`) : [error.message];
  $("problem").replaceChildren(...lines.map((line) => make("p", { textContent: line })));
}

async function base64(file) {
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("the image cannot be read"));
    reader.readAsDataURL(file);
  });
  return url.slice(url.indexOf(",") + 1);
}

async function submit(event) {
  event.preventDefault();
  $("problem").replaceChildren();
  $("make").disabled = true;
  try {
    const number = (name) => ($(name).value === "" ? {} : { [name]: Number($(name).value) });
    const clip = { model: $("model").value, image: await base64($("image").files[0]), prompt: $("prompt").value, tokenization: { mode: $("tokens").value } };
    Object.assign(clip, ...["width", "height", "frames", "steps"].map(number));
    if ($("seed").value !== "") clip.seed = $("seed").value;
    const [name, version] = $("style").value.split("@");
    if (name) clip.styles = [{ name, version, strength: Number($("strength").value) }];
    const job = await post("api/jobs", { clip, priority: "PRIORITY_INTERACTIVE", previews: { every_steps: 1 }, request_id: crypto.randomUUID?.() ?? "" });
    follow(job.job_id);
  } catch (error) {
    report(error);
    $("make").disabled = false;
  }
}

function follow(jobId) {
  own = jobId;
  $("making").hidden = false;
  $("making-cancel").hidden = false;
  $("making-picture").replaceChildren();
  const events = new EventSource(`api/jobs/${jobId}/events`);
  events.onmessage = ({ data }) => {
    const { job, preview } = JSON.parse(data);
    $("making-state").textContent = sentence(job);
    $("making-bar").value = share(job);
    const frames = preview?.frames ?? [];
    if (frames.length) {
      const image = $("making-picture").querySelector("img") ?? make("img", { alt: "Preview of your clip" });
      image.src = `data:image/webp;base64,${frames[frames.length >> 1].webp}`;
      $("making-picture").replaceChildren(image);
    }
    if (!FINAL.includes(job.state)) return;
    events.close();
    own = null;
    $("make").disabled = false;
    $("making-cancel").hidden = true;
    const video = (job.result?.artifacts ?? []).find((artifact) => artifact.mime_type === "video/mp4");
    if (video) $("making-picture").replaceChildren(player(jobId, video.name));
    refresh();
  };
  refresh();
}

$("clip").addEventListener("submit", submit);
$("model").addEventListener("change", refresh);
$("making-cancel").addEventListener("click", () => own && post(`api/jobs/${own}/cancel`).catch(report));
$("session").addEventListener("submit", async (event) => {
  event.preventDefault();
  try {
    await post("api/session", { key: $("key").value });
    $("key").value = "";
    $("key").setCustomValidity("");
  } catch (error) {
    $("key").setCustomValidity(error.message);
    $("key").reportValidity();
  }
  refresh();
});
$("key").addEventListener("input", () => $("key").setCustomValidity(""));
$("sign-out").addEventListener("click", async () => {
  await ask("api/session", { method: "DELETE" }).catch(report);
  refresh();
});
document.addEventListener("visibilitychange", refresh);
refresh();
