function createTimeline() { return { element: h("div"), update() {}, destroy() {} }; }
