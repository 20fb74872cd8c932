// A strict JSON parser (RFC 8259) that returns a flat table, as much as a manifest needs.
#pragma once

#include <map>
#include <stdexcept>
#include <string>
#include <string_view>

namespace darcnn {

struct JsonError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Json {
    enum class Kind { null, boolean, number, text, array, object };
    Kind kind = Kind::null;
    double number = 0;        // of an array or an object: how many items it has
    bool is_integer = false;  // written without fraction and exponent
    std::string text;         // a string's content
};

// Every value by its path, "input/tile_px", "graphs/detect/boxes/1/0"; the whole has the path "".
using JsonTable = std::map<std::string, Json>;

// Throws JsonError where `text` is anything but one JSON value; a name that comes twice is an error.
JsonTable parse_json(std::string_view text);

}  // namespace darcnn
