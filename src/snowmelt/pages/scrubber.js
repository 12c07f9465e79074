"use strict";
// A scrubber shows one frame of its data: pictures, numbers, curves. Nothing is computed here.
for (const scrubber of document.querySelectorAll("[data-scrubber]")) {
  const frames = JSON.parse(document.getElementById(scrubber.dataset.scrubber).textContent);
  const slider = scrubber.querySelector("input");
  const button = scrubber.querySelector("button");
  const line = scrubber.querySelector('[id$="-now"]');
  let timer = 0;

  const each = (name, change) => scrubber.querySelectorAll(`[data-${name}]`).forEach((slot) => change(slot, slot.dataset[name]));
  const source = (address) => (address.startsWith("#") ? document.getElementById(address.slice(1)).src : address);

  const show = () => {
    const frame = frames[slider.value];
    each("image", (slot, key) => { slot.src = source(frame.images[key]); slot.alt = frame.label; });
    each("text", (slot, key) => { slot.textContent = frame.texts[key]; });
    each("share", (slot, key) => { slot.style.width = `${100 * frame.shares[key]}%`; });
    each("path", (slot, key) => { slot.setAttribute("d", frame.paths[key]); });
    if (line) {
      const { left, right } = line.ownerSVGElement.dataset;
      line.setAttribute("transform", `translate(${(right - left) * frame.place} 0)`);
    }
    slider.setAttribute("aria-valuetext", frame.label);
  };
  const stop = () => { clearInterval(timer); timer = 0; button.textContent = "Play"; };
  const advance = () => {
    slider.value = Number(slider.value) + 1;
    show();
    if (slider.value === slider.max) stop();
  };
  button.addEventListener("click", () => {
    if (timer) return stop();
    if (slider.value === slider.max) slider.value = 0;
    button.textContent = "Pause";
    timer = setInterval(advance, Number(scrubber.dataset.pause ?? 140));
    show();
  });
  slider.addEventListener("input", () => { stop(); show(); });
  scrubber.querySelector(".controls").hidden = false;
  show();
}
