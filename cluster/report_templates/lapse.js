"use strict";
// Plays the time-lapse: a cursor on the figure, and every worker's queue and pool at that moment.
const holder = document.getElementById("lapse-data");
if (holder) {
  const lapse = JSON.parse(holder.textContent);
  const find = (id) => document.getElementById(id);
  const [player, play, moment, clock, cursor] = ["player", "play", "moment", "clock", "cursor"].map(find);
  const FRAMES_PER_S = 20;
  const made = (name, parent) => {
    const element = document.createElement("div");
    element.className = name;
    parent.append(element);
    return element;
  };
  const views = lapse.workers.map((worker) => {
    const box = made(`worker ${worker.role}`, find("workers"));
    made("id", box).textContent = worker.id;
    const load = made("load", box);
    const fill = made("fill", made("pool", box));
    return { worker, box, load, fill };
  });
  const show = (index) => {
    const at = lapse.at[index];
    const span = lapse.end - lapse.at[0];
    const along = span > 0 ? (at - lapse.at[0]) / span : 0;
    cursor.style.left = `${100 * (lapse.left + (lapse.right - lapse.left) * along)}%`;
    clock.textContent = `${at.toFixed(2)} s: ${lapse.inflight[index]} in flight, ${lapse.queued[index]} queued`;
    moment.setAttribute("aria-valuetext", clock.textContent);
    for (const { worker, box, load, fill } of views) {
      const total = worker.total[index];
      const isThere = total !== null;
      box.classList.toggle("absent", !isThere);
      const share = isThere ? worker.used[index] / Math.max(1, total) : 0;
      fill.style.width = `${100 * Math.min(1, share)}%`;
      load.textContent = isThere
        ? `${worker.running[index]} running, ${worker.waiting[index]} waiting, ${Math.round(100 * share)} %`
        : "not there";
    }
  };
  let timer = null;
  const stop = () => {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  };
  play.addEventListener("click", () => {
    if (timer !== null) return stop();
    if (Number(moment.value) >= Number(moment.max)) moment.value = 0;
    play.textContent = "Pause";
    timer = setInterval(() => {
      moment.value = Number(moment.value) + 1;
      show(Number(moment.value));
      if (Number(moment.value) >= Number(moment.max)) stop();
    }, 1000 / FRAMES_PER_S);
  });
  moment.addEventListener("input", () => show(Number(moment.value)));
  moment.max = lapse.at.length - 1;
  if (lapse.left_out > 0) {
    find("left-out").textContent = `${lapse.left_out} more workers are in the figure only.`;
    find("left-out").hidden = false;
  }
  player.hidden = cursor.hidden = false;
  show(0);
}
