// examples, vectors: the router of DeepSeek-V3 in C++. This is the code that is judged.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <vector>
using std::string;
using Row = std::vector<float>;
#ifndef FILL  // -DFILL=0 plants the fault of huggingface/transformers#45440
#define FILL -std::numeric_limits<float>::infinity()
#endif
double number(const string& json, const string& name, double otherwise);  // of reader.cpp

// The ids of one token, and their weights.
std::vector<int> route(const Row& logits, const Row& bias, const string& spec, Row& weights) {
    const int E = logits.size(), K = number(spec, "top_k", 0), G = number(spec, "num_expert_groups", 1), P = E / G;
    const int L = number(spec, "num_limited_groups", 1), best = number(spec, "group_score_k", 2);
    Row score(E), choice(E), group(G);
    for (int e = 0; e < E; ++e) {
        score[e] = 1 / (1 + std::exp(-logits[e]));
        choice[e] = std::isinf(logits[e]) ? -INFINITY : score[e] + bias[e];  // a masked expert is not lifted by its bias
    }
    for (int g = 0; g < G && G > 1; ++g) {
        Row own(choice.begin() + g * P, choice.begin() + (g + 1) * P);
        std::sort(own.rbegin(), own.rend());
        group[g] = std::accumulate(own.begin(), own.begin() + best, 0.f);
    }
    std::vector<int> order(G), ids(E);
    std::iota(order.begin(), order.end(), 0), std::iota(ids.begin(), ids.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return group[a] > group[b]; });
    for (int g = L; g < G; ++g)
        for (int e = 0; e < P; ++e) choice[order[g] * P + e] = FILL;  // not 0: choice scores can be negative
    std::stable_sort(ids.begin(), ids.end(), [&](int a, int b) { return choice[a] > choice[b]; });
    ids.resize(K), weights.clear();
    for (int e : ids) weights.push_back(score[e]);
    float sum = std::accumulate(weights.begin(), weights.end(), 0.f) + number(spec, "norm_eps", 0);
    for (float& w : weights) w = w / (number(spec, "route_norm", 0) ? sum : 1) * number(spec, "route_scale", 1);
    return ids;
}
// Whether route() knows every field of a spec.
bool known(const string& spec) {
    const string fields = " num_experts top_k score_func num_expert_groups num_limited_groups group_score_k route_norm"
                          " norm_eps route_scale ";
    for (size_t at = 0, end; (at = spec.find('"', at)) != string::npos; at = end + 1) {
        end = spec.find('"', at + 1);
        if (spec[end + 1] == ':' && fields.find(" " + spec.substr(at + 1, end - at - 1) + " ") == string::npos) return false;
    }
    return spec.find("\"score_func\": \"sigmoid\"") != string::npos;
}
