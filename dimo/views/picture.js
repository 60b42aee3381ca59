// A picture that tells where it was clicked, as shares of its width and height.
function render({ model, el }) {
  const image = document.createElement("img");
  image.style.cssText = "max-width: 100%; cursor: crosshair";
  const show = () => {
    const old = image.src;
    const data = model.get("png");
    image.src = URL.createObjectURL(new Blob([data], { type: "image/png" }));
    image.alt = model.get("about");
    image.hidden = !data.byteLength;
    if (old) URL.revokeObjectURL(old);
  };
  image.onclick = (event) => {
    const box = image.getBoundingClientRect();
    model.send({ x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height });
  };
  model.on("change:png", show);
  show();
  el.append(image);
  return () => { model.off("change:png", show); URL.revokeObjectURL(image.src); };
}

export default { render };
