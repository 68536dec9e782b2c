// From an image, pixel by pixel, to the K x K windows around its pixels, with zeros around the image.
//
// A pixel takes BEATS beats of WIDTH bits: all of its channels' most significant bits first, then the next ones (serial),
// or everything in one beat (parallel). The zeros are put in between: after each row P = K / 2 pixels, and after each image
// P rows. They serve the end of one row, or image, and the beginning of the next. Pixels begin at least PERIOD cycles apart.
module window #(
  parameter WIDTH = 1,
  parameter BEATS = 4,
  parameter COLUMNS = 14,
  parameter ROWS = 14,
  parameter K = 3,
  parameter STRIDE = 1,
  parameter PERIOD = 4
) (
  input wire clk,
  input wire rst,
  input wire [WIDTH-1:0] in_data,
  input wire in_valid,
  output wire in_ready,
  input wire room,                    // whether the windows of one more pixel may be sent
  output reg out_valid,
  output reg out_last,                // the last beat of a pixel
  output wire [K*K*WIDTH-1:0] taps    // row by row, the first row's first column lowest
);
  localparam P = K / 2;
  localparam SPAN = BEATS * (COLUMNS + P);  // beats of a row with its zeros
  localparam LONG = BEATS * (K - 1) + 1;    // beats of a window's row
  localparam CB = $clog2(COLUMNS + P + 1);
  localparam RB = $clog2(ROWS + P + 1);
  localparam BB = BEATS > 1 ? $clog2(BEATS) : 1;
  localparam [BB-1:0] LAST = BEATS[BB-1:0] - 1'b1;

  reg [BB-1:0] beat;
  reg start;              // the beat is a pixel's first
  reg [CB-1:0] column;
  reg [RB-1:0] row;
  reg [7:0] right, down;  // windows are sent where both are zero
  reg [3:0] pause;        // cycles before the next pixel may begin
  reg outside;            // the pixel at hand is one of the zeros
  reg started;            // an image has begun

  wire last = beat == LAST;
  wire paused = PERIOD > BEATS && pause != 0;
  wire go = ~start | (room & ~paused);
  wire advance = go & (outside | in_valid);
  assign in_ready = go & ~outside;

  wire end_of_row = column == COLUMNS + P - 1;
  wire end_of_image = row == ROWS + P - 1;
  // Some of these are constant where K = 1.
  /* verilator lint_off UNSIGNED */
  wire next_image = end_of_row & end_of_image;
  wire next_outside = ~next_image & (~started | (end_of_row ? row >= ROWS - 1 : column >= COLUMNS - 1 || row >= ROWS));
  wire centred = column >= P && row >= P && started;
  wire above = row < P;
  /* verilator lint_on UNSIGNED */

  always @(posedge clk)
    if (rst) begin
      // It begins with more zeros than lie after an image, so that what the memories held before is never seen.
      beat <= 0;
      start <= 1'b1;
      column <= 0;
      row <= P == 0 ? 0 : ROWS - 1;
      outside <= P != 0;
      started <= P == 0;
      pause <= 0;
      right <= 0;
      down <= 0;
      out_valid <= 1'b0;
      out_last <= 1'b0;
    end else begin
      out_valid <= advance & centred & (right == 0) & (down == 0);
      out_last <= last;
      pause <= advance & last ? PERIOD - BEATS : pause == 0 ? 0 : pause - 1'b1;
      if (advance) begin
        beat <= last ? 0 : beat + 1'b1;
        start <= last;
        if (last) begin
          outside <= next_outside;
          column <= end_of_row ? 0 : column + 1'b1;
          if (centred) right <= right == STRIDE - 1 ? 0 : right + 1'b1;
          if (end_of_row) begin
            right <= 0;
            if (end_of_image) started <= 1'b1;
            row <= end_of_image ? 0 : row + 1'b1;
            down <= end_of_image | above ? 0 : down == STRIDE - 1 ? 0 : down + 1'b1;
          end
        end
      end
    end

  // Row i of the window is i rows behind the newest. What comes from the row before it has waited for one beat already.
  wire [WIDTH-1:0] newest = outside ? {WIDTH{1'b0}} : in_data;
  genvar i, j;
  generate
    for (i = 0; i < K; i = i + 1) begin : line
      wire [WIDTH-1:0] first, before_it;
      if (i < 2) begin : from_input
        assign before_it = newest;
      end else begin : from_line
        assign before_it = line[i-1].first;
      end
      delay_line #(.WIDTH(WIDTH), .CYCLES(i == 0 ? 0 : i == 1 ? SPAN : SPAN - 1)) row_above (
        .clk(clk), .rst(rst), .advance(advance), .in(before_it), .out(first));
      wire [WIDTH*LONG-1:0] chain;  // the newest beat lowest
      if (LONG == 1) begin : short
        assign chain = first;
      end else begin : long
        reg [WIDTH*(LONG-1)-1:0] older;
        always @(posedge clk) if (advance) older <= chain[WIDTH*(LONG-1)-1:0];
        assign chain = {older, first};
      end
      for (j = 0; j < K; j = j + 1) begin : tap
        assign taps[WIDTH*(K*(K-1-i)+j) +: WIDTH] = chain[WIDTH*BEATS*(K-1-j) +: WIDTH];
      end
    end
  endgenerate
endmodule
