// The transforms of winograd.py, B x B' and A products A', for activations [b h w c] in float32.
//
// A tile of 4x4 outputs begins at each fourth row and column, and its window of 6x6 inputs one row
// and one column before it. Beyond the edges of a map there are zeros. Channels lie side by side,
// and 16 of them are computed at once.

#include <cstdint>
#include <cstring>

namespace {

constexpr int TILE = 4, WINDOW = 6, POINTS = WINDOW * WINDOW, LANES = 16;

typedef float Lanes __attribute__((vector_size(LANES * sizeof(float))));

template <class V> V load(const float *from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class V> void store(float *to, V v) { std::memcpy(to, &v, sizeof v); }

// The six values that lie `step` apart from x on, replaced by B times these.
template <class V> void times_b(V *x, int step) {
    V x0 = x[0], x1 = x[step], x2 = x[2 * step], x3 = x[3 * step], x4 = x[4 * step];
    V near = x4 - 4 * x2, far = x4 - x2, odd_near = x3 - 4 * x1, odd_far = 2 * (x3 - x1);
    x[0] = 4 * x0 - 5 * x2 + x4;
    x[step] = near + odd_near;
    x[2 * step] = near - odd_near;
    x[3 * step] = far + odd_far;
    x[4 * step] = far - odd_far;
    x[5 * step] = 4 * x1 - 5 * x3 + x[5 * step];
}

// The first four of six values that lie `step` apart from x on, replaced by A times all six.
template <class V> void times_a(V *x, int step) {
    V sum_near = x[step] + x[2 * step], sum_far = x[3 * step] + x[4 * step];
    V odd_near = x[step] - x[2 * step], odd_far = x[3 * step] - x[4 * step];
    x[0] = x[0] + sum_near + sum_far;
    x[step] = odd_near + 2 * odd_far;
    x[2 * step] = sum_near + 4 * sum_far;
    x[3 * step] = odd_near + 8 * odd_far + x[5 * step];
}

// The values of one window; a place that is null lies beyond the edge.
template <class V> void values(const float *const *places, float *out, int64_t k, int64_t c) {
    V x[POINTS];
    for (int i = 0; i < POINTS; ++i) x[i] = places[i] ? load<V>(places[i] + k) : V{};
    for (int i = 0; i < WINDOW; ++i) times_b(x + i, WINDOW);
    for (int i = 0; i < WINDOW; ++i) times_b(x + i * WINDOW, 1);
    for (int i = 0; i < POINTS; ++i) store(out + i * c + k, x[i]);
}

// One tile of outputs; a place that is negative lies beyond the edge.
template <class V>
void tile(const float *products, const float *bias, const float *added, float *y,
          const int64_t *places, int64_t k, int64_t c, bool relu) {
    V x[POINTS];
    for (int i = 0; i < POINTS; ++i) x[i] = load<V>(products + i * c + k);
    for (int i = 0; i < WINDOW; ++i) times_a(x + i, WINDOW);
    for (int i = 0; i < TILE; ++i) times_a(x + i * WINDOW, 1);
    V shift = load<V>(bias + k);
    for (int i = 0; i < TILE * TILE; ++i) {
        if (places[i] < 0) continue;
        V out = x[i / TILE * WINDOW + i % TILE] + shift;
        if (added) out += load<V>(added + places[i] + k);
        if (relu) out = out < 0 ? V{} : out;  // NaN stays
        store(y + places[i] + k, out);
    }
}

// A map's tiles, and where places around a tile are.
struct Grid {
    int64_t h, w, c, rows = (h + TILE - 1) / TILE, columns = (w + TILE - 1) / TILE;

    int64_t place(int64_t number, int64_t i, int64_t j) const {
        int64_t row = number / columns % rows * TILE + i, column = number % columns * TILE + j;
        if (row < 0 || row >= h || column < 0 || column >= w) return -1;
        return ((number / columns / rows * h + row) * w + column) * c;
    }
};

}  // namespace

extern "C" void winograd_values(const float *x, float *out, int64_t b, int64_t h, int64_t w,
                                int64_t c, int64_t threads) {
    Grid grid{h, w, c};
    int64_t tiles = b * grid.rows * grid.columns;
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < tiles; ++t) {
        const float *places[POINTS];
        for (int i = 0; i < POINTS; ++i) {
            int64_t place = grid.place(t, i / WINDOW - 1, i % WINDOW - 1);
            places[i] = place < 0 ? nullptr : x + place;
        }
        int64_t k = 0;
        for (; k + LANES <= c; k += LANES) values<Lanes>(places, out + t * POINTS * c, k, c);
        for (; k < c; ++k) values<float>(places, out + t * POINTS * c, k, c);
    }
}

extern "C" void winograd_tiles(const float *products, const float *bias, const float *added,
                               float *y, int64_t b, int64_t h, int64_t w, int64_t c, int64_t relu,
                               int64_t threads) {
    Grid grid{h, w, c};
    int64_t tiles = b * grid.rows * grid.columns;
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < tiles; ++t) {
        int64_t places[TILE * TILE];
        for (int i = 0; i < TILE * TILE; ++i) places[i] = grid.place(t, i / TILE, i % TILE);
        const float *from = products + t * POINTS * c;
        int64_t k = 0;
        for (; k + LANES <= c; k += LANES) tile<Lanes>(from, bias, added, y, places, k, c, relu);
        for (; k < c; ++k) tile<float>(from, bias, added, y, places, k, c, relu);
    }
}
