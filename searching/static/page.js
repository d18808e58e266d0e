// The page: what is asked stands in the address, and all that is shown comes from the API for what stands there.

import {enlarge, large} from "./large.js";
import {find, make, picture, unseen} from "./parts.js";

const [form, text, file, go, problem, status, heading, grid] = ["#query", "#text", "#file", "#go", "#problem", "#status",
    "#heading", "#grid"].map(find);
const MOST_STEPS = 30, OFFERED = 60, CHIPS = 8, RESULTS = "Results";
const known = new Map();        // image id -> {path, metadata}, of all that was shown so far
const answers = new Map();      // address of a question -> its answer, so that going back takes no time
let model;                      // what /api/model says
let query = {};                 // {image, text, k, nearness, where, name, steps: [{image, text}]}, as the address has it
let drawn = null;               // {address, title, said} of what the grid shows
let current;                    // the request under way; an answer to any other is dropped

// --- the address

function read() {
    const asked = new URLSearchParams(location.search);
    const steps = asked.getAll("step").map(step => {
        const colon = step.indexOf(":");
        return {image: step.slice(0, colon), text: step.slice(colon + 1)};
    });
    return {image: asked.get("image") || "", text: asked.get("text") || "", where: asked.get("where") || "",
        name: asked.get("name") || "", k: Number(asked.get("k")) || model.k,
        nearness: Number(asked.get("nearness") ?? model.nearness), steps};
}

function address(asked) {
    const words = new URLSearchParams();
    for (const name of ["image", "text", "where", "name"])
        if (asked[name]) words.set(name, asked[name]);
    for (const name of ["k", "nearness"])
        if (asked[name] !== model[name]) words.set(name, asked[name]);
    for (const step of asked.steps) words.append("step", `${step.image}:${step.text}`);
    return `?${words}`;
}

function go_to(asked) {
    query = asked;
    if (address(asked) !== location.search) history.pushState(null, "", address(asked));
    return show();
}

function stepped() {
    return query.image ? [...query.steps, {image: query.image, text: query.text}].slice(-MOST_STEPS) : query.steps;
}

// --- requests

async function api(path, words, sent) {
    const given = String(new URLSearchParams(Object.entries(words).filter(([, value]) => value !== "")));
    const response = await fetch(given ? `${path}?${given}` : path, {signal: current?.signal, ...sent}).catch(() => {
        throw new Error("The server does not answer: is search.py still running?");
    });
    const answer = await response.json().catch(() => ({error: `The server answers ${response.status}; try again.`}));
    if (!response.ok) throw new Error(sentence(answer.error));
    return answer;
}

const capital = word => word[0].toUpperCase() + word.slice(1);
const sentence = said => said.replace(/^[a-z]+(?=[ ,])/, capital) + (/[.!?]$/.test(said) ? "" : ".");

// One request at a time: work() asks, then() draws its answer unless another was asked for meanwhile.
async function only(what, work, then) {
    current?.abort();
    const mine = current = new AbortController();
    busy(true);
    status.textContent = what;
    problem.textContent = "";
    try {
        const answer = await work();
        if (mine === current) then(answer);
    } catch (error) {
        if (mine !== current) return;
        if (!drawn && query.image) {                    // a link to what is gone: the gallery in its place
            query = {...query, image: "", where: "", steps: []};
            show_source();
            await offer();
        }
        problem.textContent = error.message;
        if (drawn) status.textContent = drawn.said;
    } finally {
        if (mine === current) busy(false);
    }
}

function busy(is) {
    grid.setAttribute("aria-busy", is);
    go.setAttribute("aria-disabled", is);
    go.firstElementChild.textContent = is ? "Searching…" : "Search";
    date(is);
}

// What is shown is dimmed, and said to be old, where it is not what is asked for now.
function date(is_asking = false) {
    if (!drawn) return;
    const is_result = drawn.title === RESULTS;
    const is_another = drawn.address !== address(query) || text.value.trim() !== query.text;
    document.body.classList.toggle("stale", is_asking || (is_result && is_another));
    heading.textContent = drawn.title + (is_result && (is_asking || is_another) ? " of the query before" : "");
}

// --- showing what the address asks for

function show() {
    text.value = query.text;
    find("#where").value = query.where;
    find("#nearness").value = query.nearness;
    find("#part").value = query.name;
    typed();
    show_source();
    show_steps();
    show_k();
    return query.image ? search() : offer();
}

function offer(shuffle = false) {
    const asked = {name: query.name, k: OFFERED, shuffle: shuffle || ""};
    return only("Looking…", () => api("api/images", asked), answer => {
        const counted = `${answer.count.toLocaleString("en")} picture${answer.count === 1 ? "" : "s"}`;
        draw("The gallery", answer.images, !answer.count ? `No picture has “${query.name}” in its name.` : query.name
            ? `${counted} with “${query.name}” in the name.` : `${counted}. Choose one to start from.`);
    });
}

function search() {
    const asked = address({...query, steps: []}), {image, text, k, nearness, where} = query;
    return only(`Searching from ${told()}…`,
        async () => answers.get(asked) || api("api/search", {image, text, k, nearness, where}),
        answer => draw_answer(asked, answer));
}

function draw_answer(asked, answer) {
    answers.set(asked, answer);
    remember(answer);
    show_source();
    show_steps();
    const count = answer.results.length, nearest = count === 1 ? "nearest" : `${count} nearest`;
    const said = !count ? `No picture fulfils ${query.where || "this"}.`
        : `The ${nearest} of ${model.images.toLocaleString("en")} pictures to ${told()}.`;
    draw(RESULTS, answer.results, [said, ...answer.warnings.map(sentence)].join(" "));
}

function draw(title, images, said) {
    const is_gallery = title !== RESULTS;
    status.textContent = said;
    find("#finding").hidden = !is_gallery;
    find("#options").hidden = is_gallery;
    find("#examples").hidden = !is_gallery || query.name !== "" || !model.examples.length;
    const had_focus = grid.contains(document.activeElement);
    images.forEach(remember);
    grid.replaceChildren(...images.map(card));
    if (had_focus) heading.focus({preventScroll: true});
    document.title = query.image ? told() : "A picture plus a change";
    drawn = {address: address(query), title, said};
    date();
}

function remember(image) {
    known.set(String(image.image), {path: image.path, metadata: image.metadata});
}

function name_of(image) {
    return known.get(String(image))?.path ?? (image.startsWith?.("u") ? "the uploaded picture" : `picture ${image}`);
}

function told() {
    return name_of(query.image) + (query.text ? ` plus “${query.text}”` : "");
}

// --- parts of the page

function card(image, place, all) {
    const facts = Object.values(image.metadata).filter(value => value !== null && value !== "").slice(0, 3).join(" · ");
    const number = image.rank ? [make("span", {class: "rank", title: `score ${image.score.toFixed(3)}`},
        unseen("rank "), `${image.rank}`)] : [];
    return make("li", {class: "card"},
        make("button", {type: "button", class: "pick", onclick: () => choose(image.image)},
            unseen("Search from "), picture(image.image, image.path)),
        make("div", {class: "about"},
            make("p", {}, ...number, make("span", {class: "name", title: image.path}, image.path),
                ...(facts ? [make("span", {class: "facts"}, facts)] : [])),
            make("button", {type: "button", class: "more", onclick: () => enlarge(all, place, query.image, choose)},
                unseen(`Enlarge ${image.path}`), find("#arrows").content.cloneNode(true))));
}

function show_source() {
    const {image} = query, shown = find("#picture img");
    document.body.classList.toggle("chosen", Boolean(image));
    find("#picture").hidden = !image;
    find("#none").hidden = Boolean(image);
    find("#name").textContent = image ? name_of(image) : "";
    find("#choose span").textContent = image ? "Upload another" : "Upload a picture";
    if (!image) return;
    shown.alt = name_of(image);
    const path = `thumbnails/${image}${image.startsWith("u") ? "" : "?large=true"}`;
    if (shown.getAttribute("src") !== path) {
        shown.src = path;
        find("#picture").classList.remove("new");
        requestAnimationFrame(() => find("#picture").classList.add("new"));
    }
}

function show_steps() {
    const trail = query.image ? [...query.steps, query] : [];
    find("#steps").hidden = trail.length < 2;
    find("#steps ol").replaceChildren(...trail.map((step, place) => {
        const is_last = place === trail.length - 1, back = {...step, steps: query.steps.slice(0, place)};
        const button = step_button(step, step.text || "looks like it", () => is_last || go_to({...query, ...back}));
        if (is_last) button.setAttribute("aria-current", "step");
        return make("li", {}, button);
    }));
    find("#steps ol").lastElementChild?.scrollIntoView?.({block: "nearest", inline: "end"});
}

function step_button(step, words, onclick) {
    return make("button", {type: "button", class: "step", onclick}, picture(step.image, name_of(step.image), 44),
        make("span", {}, unseen(" plus "), words));
}

function show_k() {
    const choices = [...new Set([10, 20, 50, 100, query.k])].filter(k => k <= model.most).sort((a, b) => a - b);
    find("#k").replaceChildren(...choices.map(k => make("option", k === query.k ? {selected: ""} : {}, `${k}`)));
}

function show_model() {
    find("#asked").textContent = model.looks_for ? "What you look for" : "What should change";
    text.placeholder = model.texts.length ? `such as: ${model.texts[0]}` : "";
    find("#filter").hidden = !model.columns.length;
    find("#where").placeholder = `${model.columns[0]} = …`;
    find("#where").title = `a condition on ${model.columns.join(", ")}`;
    find("#about").append(`${model.model} over ${model.images.toLocaleString("en")} pictures · `,
        make("a", {href: "openapi.json"}, "API"));
    find("#examples ul").replaceChildren(...model.examples.map(example => {
        remember(example);
        const asked = {image: String(example.image), text: example.text, name: "", steps: []};
        return make("li", {}, step_button(example, example.text, () => go_to({...query, ...asked})));
    }));
}

// --- choosing and asking

function choose(image) {
    const waiting = text.value.trim();                  // typed, and not yet asked about: it belongs to this picture
    large.close();
    scroll_up();
    go_to({...query, image: String(image), text: waiting === query.text ? "" : waiting, name: "", steps: stepped()});
}

function scroll_up() {
    window.scrollTo({top: 0, behavior: "instant"});
}

function ask(event) {
    event.preventDefault();
    if (go.getAttribute("aria-disabled") === "true") return;
    problem.textContent = "";
    if (!query.image) {
        problem.textContent = "Choose a picture first: one of the gallery, or one of yours.";
        return;
    }
    const wanted = text.value.trim();
    if (wanted === query.text && drawn?.address === address(query)) return;
    scroll_up();
    go_to({...query, text: wanted, steps: wanted === query.text ? query.steps : stepped()});
}

function upload(chosen) {
    if (!chosen) return;
    const waiting = text.value.trim(), wanted = waiting === query.text ? "" : waiting, body = new FormData();
    const {k, nearness, where} = query;
    for (const [name, value] of Object.entries({text: wanted, k, nearness, where})) body.set(name, value);
    body.set("file", chosen, chosen.name);
    scroll_up();
    only(`Searching from ${chosen.name}…`, () => api("api/search", {}, {method: "POST", body}), answer => {
        remember(answer);
        query = {...query, image: answer.image, text: wanted, name: "", steps: stepped()};
        history.pushState(null, "", address(query));
        text.value = wanted;
        draw_answer(address({...query, steps: []}), answer);
    }).finally(() => { file.value = ""; });
}

// --- words: what the model knows completes what is typed, the rest is struck through

const words_of = typed => typed.replace(/[^\x00-\x7f]/g, "").toLowerCase().replace(/[!-/:-@[-`{-~]/g, "")
    .split(/\s+/).filter(Boolean);

function typed() {
    const reading = find("#reading"), words = words_of(text.value);
    const strange = model.words ? words.filter(word => !model.words.includes(word)) : [];
    reading.hidden = !strange.length || strange.length === words.length;
    reading.replaceChildren("Read as: ", ...(reading.hidden ? [] : words.flatMap(word => strange.includes(word)
        ? [make("s", {}, word), unseen(" (left out)"), " "] : [make("b", {}, word), " "])));
    find("#words").replaceChildren(...suggestions(words).map(word => make("li", {}, make("button",
        {type: "button", class: "chip", onclick: () => complete(word)}, word))));
    date(grid.getAttribute("aria-busy") === "true");
}

function suggestions(words) {
    if (!text.value.trim()) return model.texts.slice(0, CHIPS);
    const such = text.value.trim().toLowerCase();
    if (!model.words) return model.texts.filter(each => each !== such && each.includes(such));
    const last = /\s$/.test(text.value) ? "" : words.at(-1) ?? "";
    const fits = model.words.filter(word => word.startsWith(last) && !words.includes(word));
    return fits.sort((a, b) => a.length - b.length).slice(0, CHIPS);
}

function complete(word) {
    text.value = model.words && text.value.trim() ? text.value.replace(/\S*$/, "") + word + " " : word;
    text.focus();
    typed();
}

// --- what a visitor does

form.addEventListener("submit", ask);
text.addEventListener("input", () => { problem.textContent = ""; typed(); });
file.addEventListener("change", () => upload(file.files[0]));
find("#skip").addEventListener("click", event => { event.preventDefault(); heading.focus(); });
find("#picture").addEventListener("click", () => enlarge([{image: query.image, metadata: {},
    ...known.get(query.image), path: name_of(query.image)}], 0, query.image, choose));
find("#finding").addEventListener("submit", event => {
    event.preventDefault();
    go_to({...query, name: find("#part").value.trim()});
});
find("#others").addEventListener("click", () => offer(true));
find("#all").addEventListener("click", () => { scroll_up(); go_to({...query, image: "", text: "", steps: []}); });
find("#options").addEventListener("submit", event => {
    event.preventDefault();
    go_to({...query, where: find("#where").value.trim()});
});
find("#nearness").addEventListener("change", () => go_to({...query, nearness: find("#nearness").valueAsNumber}));
find("#k").addEventListener("change", () => go_to({...query, k: Number(find("#k").value)}));
document.addEventListener("paste", event => upload(event.clipboardData.files[0]));
const dragging = is => document.body.classList.toggle("dragging", is);
document.addEventListener("dragover", event => { event.preventDefault(); dragging(true); });
document.addEventListener("dragleave", event => dragging(Boolean(event.relatedTarget)));
document.addEventListener("drop", event => {
    event.preventDefault();
    dragging(false);
    upload(event.dataTransfer.files[0]);
});
window.addEventListener("popstate", () => { large.close(); query = read(); show(); });

try {
    model = await api("api/model", {});
    query = read();
    show_model();
    await show();
} catch (error) {
    problem.textContent = error.message;
}
