// Making parts of the page; whatever comes from files and visitors goes in as text.

export const find = selector => document.querySelector(selector);

export function make(kind, attributes = {}, ...content) {
    const made = document.createElement(kind);
    for (const [name, value] of Object.entries(attributes))
        if (name === "onclick") made.addEventListener("click", value);
        else made.setAttribute(name, value);
    made.append(...content);
    return made;
}

export function picture(image, words = "", size = 320) {
    const src = `thumbnails/${image}`;
    return make("img", {src, alt: words, width: size, height: size, loading: "lazy", decoding: "async"});
}

export function unseen(words) {
    return make("span", {class: "unseen"}, words);
}
