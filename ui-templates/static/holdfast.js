// Writes times in the viewer's zone. Pages say UTC without it.
(function () {
  "use strict";
  function two(n) { return String(n).padStart(2, "0"); }
  function localise() {
    document.querySelectorAll("time[datetime]:not([data-local]), text[data-time]:not([data-local])").forEach(function (el) {
      var at = new Date(el.getAttribute("datetime") || el.getAttribute("data-time"));
      if (isNaN(at)) { return; }
      var day = at.getFullYear() + "-" + two(at.getMonth() + 1) + "-" + two(at.getDate());
      var time = two(at.getHours()) + ":" + two(at.getMinutes()) + ":" + two(at.getSeconds());
      var was = el.textContent;
      if (el.tagName.toLowerCase() === "time") {
        el.title = was;
        el.textContent = day + " " + time;
      } else {
        el.textContent = was.indexOf("-") === 2 ? day.slice(5) + " " + time.slice(0, 5) : time;
      }
      el.setAttribute("data-local", "");
    });
  }
  document.addEventListener("DOMContentLoaded", localise);
  document.addEventListener("htmx:afterSettle", localise);
  document.addEventListener("htmx:sseOpen", function () { document.documentElement.setAttribute("data-live", ""); });
  document.addEventListener("htmx:sseError", function () { document.documentElement.removeAttribute("data-live"); });
})();
