function createCharts() { return { element: h("div"), update() {}, destroy() {} }; }
