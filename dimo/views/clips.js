// The clips of a report: a click, Enter or space stops one, or lets it go on.
for (const clip of document.querySelectorAll(".clip")) clip.onclick = () => {
  const video = clip.querySelector("video"), stops = !video.paused;
  clip.setAttribute("aria-pressed", stops);
  if (stops) video.pause();
  else video.play();
};
