// One picture, enlarged: what is known of it, and the ways on from it.

import {find, make} from "./parts.js";

export const large = find("#large");
let shown = [], place = 0;      // the pictures that one can leaf through, and which of them it is
let chosen, choose;             // the query's picture, from which one cannot search anew; what "Search from here" does

export function enlarge(...asked) {
    [shown, place, chosen, choose] = asked;
    const {image, path, metadata} = shown[place], is_upload = String(image).startsWith("u");
    const img = find("#large img");
    img.src = `thumbnails/${image}${is_upload ? "" : "?large=true"}`;
    img.alt = path;
    find("#large-name").textContent = path;
    find("#large dl").replaceChildren(...Object.entries(metadata).flatMap(([name, value]) =>
        [make("dt", {}, name), make("dd", {}, String(value ?? ""))]));
    for (const link of [find("#open"), find("#download")]) {
        link.href = `images/${image}`;
        link.hidden = is_upload;
    }
    find("#download").download = path.split("/").at(-1);
    find("#copy span").textContent = "Copy name";
    find("#here").hidden = String(image) === chosen;
    find("#previous").hidden = find("#next").hidden = shown.length < 2;
    if (!large.open) large.showModal();
}

function turn(by) {
    enlarge(shown, (place + by + shown.length) % shown.length, chosen, choose);
}

async function copy(words) {
    if (navigator.clipboard) return navigator.clipboard.writeText(words);
    const field = make("textarea", {}, words);          // a page that is not from this machine, without https
    large.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
}

find("#close").addEventListener("click", () => large.close());
find("#here").addEventListener("click", () => choose(shown[place].image));
find("#previous").addEventListener("click", () => turn(-1));
find("#next").addEventListener("click", () => turn(1));
find("#copy").addEventListener("click", async () => {
    await copy(shown[place].path).then(() => { find("#copy span").textContent = "Copied"; },
        () => { find("#copy span").textContent = "Copying is not allowed here"; });
});
large.addEventListener("click", event => { if (event.target === large) large.close(); });
large.addEventListener("keydown", event => {
    if (event.key === "ArrowLeft") turn(-1);
    if (event.key === "ArrowRight") turn(1);
});
